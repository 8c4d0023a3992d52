"""Builds and loads the compiled kernels, so that no killed, failing or simultaneous build can hurt a later
one.

A build happens in a temporary folder under a lock of our own (`flock`: the kernel frees it when its holder
dies, unlike the lock file of `torch.utils.cpp_extension`), and is renamed into place when whole. The folder's
name says what it was built from and for: sources, torch, compiler, architectures.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE_FOLDER = Path(__file__).parent / "csrc"
SOURCES = {
    "cpp": ("cpu_ops.cpp", "cpu_generic.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp", "cpu_avx512_bf16.cpp"),
    "cuda": ("cuda_ops.cu",),
}
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11's
FLAGS = {
    "cpp": ["-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", STABLE_ABI],
    "cuda": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA", STABLE_ABI],
}
DEFAULT_ARCHITECTURES = "8.0 9.0"


class BuildError(Exception):
    """The kernels cannot be built here; the message is one line that says why."""


@dataclass(frozen=True)
class LoadedKernels:
    """Kernels registered with torch in this process."""

    library: Path
    description: str
    seconds: float  # that the build took, whenever it was


def cache_folder() -> Path:
    """$HDSCALE_CACHE, else $XDG_CACHE_HOME/hdscale, else ~/.cache/hdscale."""
    if folder := os.environ.get("HDSCALE_CACHE"):
        return Path(folder) / "ops"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hdscale" / "ops"


def cuda_architectures() -> list[str]:
    """Compute capabilities to build for: $TORCH_CUDA_ARCH_LIST (`8.0 9.0`, `8.0;9.0+PTX`), else the visible
    GPU's, else 8.0 and 9.0."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not listed and torch.cuda.is_available():
        listed = "{}.{}".format(*torch.cuda.get_device_capability())
    return (listed or DEFAULT_ARCHITECTURES).replace(";", " ").split()


def forced_cuda() -> bool:
    """Whether HDSCALE_FORCE_CUDA=1 asks for a CUDA build on a machine without a GPU (a login node)."""
    return os.environ.get("HDSCALE_FORCE_CUDA", "0") not in ("", "0")


def build_kernels(backend: str, force: bool = False) -> Path:
    """Build the kernels of `cpp` or `cuda` unless they are there; returns the folder with library and
    build.json.

    Raises:
        BuildError: no compiler, a compile error, or a cache folder that cannot be written.
    """
    compiler = _compiler(backend)
    target = cache_folder() / f"{backend}-{_fingerprint(backend, compiler)}"
    if _whole(target) and not force:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_suffix(".lock")):
            if _whole(target) and not force:  # built while we waited
                return target
            for stale in target.parent.glob(f"{target.name}.tmp*"):  # we hold the lock: whoever made it is dead
                shutil.rmtree(stale, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp", dir=target.parent))
            try:
                started = time.time()
                _compile(backend, folder, compiler)
                record = {
                    "seconds": round(time.time() - started, 1),
                    "torch": torch.__version__,
                    "compiler": compiler,
                }
                (folder / "build.json").write_text(json.dumps(record))
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"cannot write to {target.parent} ({error.strerror}); set HDSCALE_CACHE") from error
    return target


def find_built(backend: str) -> dict[str, str | float] | None:
    """What is known of an earlier build for this torch, compiler and architecture; None if there is none.

    Raises:
        BuildError: no compiler.
    """
    folder = cache_folder() / f"{backend}-{_fingerprint(backend, _compiler(backend))}"
    return json.loads((folder / "build.json").read_text()) | {"folder": str(folder)} if _whole(folder) else None


def load_kernels(backend: str) -> LoadedKernels:
    """Build the kernels if need be, and register them with torch.

    Raises:
        BuildError: they cannot be built or loaded here.
    """
    folder = build_kernels(backend)
    library = folder / _library_name(backend)
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        raise BuildError(f"{library} does not load: {str(error).splitlines()[0]}") from error
    record = json.loads((folder / "build.json").read_text())
    if backend == "cpp":
        name = ctypes.CDLL(str(library)).hdscale_cpu_kernels
        name.restype = ctypes.c_char_p
        detail = name().decode()
    else:
        detail = "sm_" + ", sm_".join(arch.replace(".", "") for arch in cuda_architectures())
    return LoadedKernels(
        library, f"{detail}, built in {record['seconds']:.0f} s by {record['compiler']}", record["seconds"]
    )


def _library_name(backend: str) -> str:
    return f"hdscale_{backend}.so"


def _whole(folder: Path) -> bool:
    return (folder / "build.json").exists()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "a") as handle:
        # some network file systems have no locks: there, simultaneous builds waste time, but the rename keeps
        # them apart
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _compiler(backend: str) -> str:
    """The compiler's version line. Raises BuildError if there is none."""
    command = _nvcc() if backend == "cuda" else os.environ.get("CXX", "c++")
    try:
        lines = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"no compiler: {command} --version fails; install one or set CXX") from error
    return next((line for line in lines if "release" in line), lines[0]).strip()


def _nvcc() -> str:
    # cpp_extension's CUDA_HOME is None under a CPU build of torch, which is what a login node may have
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        raise BuildError(f"no CUDA toolkit: {nvcc} is not there; load its module or set CUDA_HOME")
    return nvcc


def _fingerprint(backend: str, compiler: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE_FOLDER.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cuda_architectures() if backend == "cuda" else []
    digest.update(repr((torch.__version__, compiler, platform.machine(), FLAGS[backend], target)).encode())
    return digest.hexdigest()[:16]


def _compile(backend: str, folder: Path, compiler: str) -> None:
    sources = [str(SOURCE_FOLDER / name) for name in SOURCES[backend]]
    if backend == "cuda":
        _compile_cuda(sources, folder)
    else:
        _compile_cpp(sources, folder)


def _compile_cpp(sources: list[str], folder: Path) -> None:
    # in a process of its own: cpp_extension loads what it builds, and we want to load the renamed file, once
    code = (
        "import sys, json; from torch.utils.cpp_extension import load; from hdscale.ops import operator;"
        "load(**json.loads(sys.argv[1]))"
    )
    arguments = {
        "name": "hdscale_cpp",
        "sources": sources,
        "extra_cflags": FLAGS["cpp"],
        "build_directory": str(folder),
        "is_python_module": False,
    }
    _run([sys.executable, "-c", code, json.dumps(arguments)], folder)


def _compile_cuda(sources: list[str], folder: Path) -> None:
    # nvcc by hand: cpp_extension links against CUDA's torch libraries, which a CPU build of torch (login
    # node) lacks, and the stable ABI needs none of them
    from torch.utils.cpp_extension import include_paths

    command = [
        _nvcc(),
        *FLAGS["cuda"],
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-o",
        str(folder / _library_name("cuda")),
    ]
    for architecture in cuda_architectures():
        number = architecture.removesuffix("+PTX").replace(".", "")
        command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    for path in include_paths():
        command += ["-isystem", path]
    _run(command + sources, folder)


def _run(command: list[str], folder: Path) -> None:
    """Raises BuildError with the first line of output that speaks of an error."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if result.returncode:
        output = (result.stdout + "\n" + result.stderr).strip().splitlines()
        telling = [line for line in output if "error" in line.lower()] or output[-1:] or ["no output"]
        raise BuildError(telling[0].strip())
