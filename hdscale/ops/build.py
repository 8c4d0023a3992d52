"""Build and load the compiled kernels, so that no killed, failing or simultaneous build can break a later one.

A build runs in a temporary folder under a lock that the kernel frees when its holder dies (unlike the lock file of
`torch.utils.cpp_extension`). The folder is renamed when the build is complete. Its name depends on everything that the
build depends on: sources, torch, compiler, architectures.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hdscale.errors import UserError
from hdscale.files import cache_folder, locked, write_json

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
    """The kernels cannot be built on this machine; the message is one line that says why."""


@dataclass(frozen=True)
class LoadedKernels:
    """Kernels registered with torch in this process.

    Attributes:
        library: the shared library.
        description: instruction set or architectures, compiler, and how long the build took.
        seconds: how long the build took, now or earlier.
    """

    library: Path
    description: str
    seconds: float


def kernel_folder() -> Path:
    """The folder of all builds, in hdscale's cache folder.

    Raises:
        BuildError: if the cache folder cannot be made or written.
    """
    try:
        return cache_folder() / "ops"
    except UserError as error:
        raise BuildError(str(error)) from error


def cuda_architectures() -> list[str]:
    """Compute capabilities to build for.

    $TORCH_CUDA_ARCH_LIST (`8.0 9.0`, `8.0;9.0+PTX`), else the visible GPU's, else 8.0 and 9.0.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not listed and torch.cuda.is_available():
        listed = "{}.{}".format(*torch.cuda.get_device_capability())
    return (listed or DEFAULT_ARCHITECTURES).replace(";", " ").split()


def forced_cuda() -> bool:
    """Whether HDSCALE_FORCE_CUDA=1 asks for a CUDA build on a machine without a GPU (a login node)."""
    return os.environ.get("HDSCALE_FORCE_CUDA", "0") not in ("", "0")


def build_kernels(backend: str, force: bool = False) -> Path:
    """Build the kernels of `cpp` or `cuda` unless they are built already.

    Args:
        backend: `cpp` or `cuda`.
        force: build them in any case.

    Returns:
        the folder with the library and build.json.

    Raises:
        BuildError: if there is no compiler, for a compile error, or if the cache folder cannot be written.
    """
    compiler = _compiler(backend)
    target = kernel_folder() / f"{backend}-{_fingerprint(backend, compiler)}"
    if _complete(target) and not force:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock")):
            if _complete(target) and not force:  # built by another process while this one waited
                return target
            for stale in target.parent.glob(
                f"{target.name}.tmp*"
            ):  # made by a process that was killed: the lock is ours
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
                write_json(folder / "build.json", record, indent=None)
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"cannot write to {target.parent} ({error.strerror}); set HDSCALE_CACHE") from error
    return target


def find_built(backend: str) -> dict[str, str | float] | None:
    """The record and folder of an earlier build for this torch, compiler and architecture; None if there is none.

    Raises:
        BuildError: if there is no compiler, or if the cache folder cannot be written.
    """
    folder = kernel_folder() / f"{backend}-{_fingerprint(backend, _compiler(backend))}"
    return json.loads((folder / "build.json").read_text()) | {"folder": str(folder)} if _complete(folder) else None


def load_kernels(backend: str) -> LoadedKernels:
    """Build the kernels if necessary, and register them with torch.

    Raises:
        BuildError: if they cannot be built or loaded on this machine.
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


def _complete(folder: Path) -> bool:
    return (folder / "build.json").exists()


def _compiler(backend: str) -> str:
    """The compiler's version line. Raises BuildError if there is none."""
    command = _nvcc() if backend == "cuda" else os.environ.get("CXX", "c++")
    try:
        lines = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"no compiler: {command} --version fails; install one or set CXX") from error
    return next((line for line in lines if "release" in line), lines[0]).strip()


def _nvcc() -> str:
    # cpp_extension's CUDA_HOME is None in a CPU build of torch, which a login node may have
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        raise BuildError(f"no CUDA toolkit: {nvcc} does not exist; load its module or set CUDA_HOME")
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
    # in a separate process: cpp_extension loads what it builds, but only the renamed file may be loaded, and once
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
    # nvcc is called directly: cpp_extension links against torch's CUDA libraries, which a CPU build of torch (on a
    # login node) lacks, and the stable ABI needs none of them
    from torch.utils.cpp_extension import include_paths  # saves 0.2 s where no CUDA is built

    library = str(folder / _library_name("cuda"))
    command = [_nvcc(), *FLAGS["cuda"], "-shared", "-Xcompiler", "-fPIC", "-o", library]
    for architecture in cuda_architectures():
        number = architecture.removesuffix("+PTX").replace(".", "")
        command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    for path in include_paths():
        command += ["-isystem", path]
    _run(command + sources, folder)


def _run(command: list[str], folder: Path) -> None:
    """Run a command; raise BuildError with the first line of its output that contains "error" if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if result.returncode:
        output = (result.stdout + "\n" + result.stderr).strip().splitlines()
        errors = [line for line in output if "error" in line.lower()] or output[-1:] or ["no output"]
        raise BuildError(errors[0].strip())
