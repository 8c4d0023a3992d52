"""Compile one backend's kernels with `torch.utils.cpp_extension`, in a process of its own.

`python -m hdscale.ops.compile BACKEND FOLDER [ARCHITECTURE …]` writes FOLDER/hdscale_BACKEND.so. It is a process
because cpp_extension loads what it has built, and only the file that was renamed into the cache may be loaded, once.

The libraries name torch's own (`torch_cpu`, `torch_cuda`) as what they need: torch loads its libraries privately, so a
symbol of theirs is found only in a library that is named. A CPU build of torch, as on a login node, has no
`torch_cuda`: empty stand-ins of that name are linked, and the library that results needs the real ones when it is
loaded.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from hdscale.ops.architectures import nvcc_flags

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
LINK_FLAGS = {
    "cpp": [],
    # without it a linker drops libraries that look unused, and an empty stand-in always does
    "cuda": ["-Wl,--no-as-needed"],
}
STAND_INS = ("torch_cuda", "c10_cuda")


class CompilerError(Exception):
    """There is no compiler that can be used; the message is one line that says why."""


def library_name(backend: str) -> str:
    """The file name of a backend's library."""
    return f"hdscale_{backend}.so"


def compiler_version(backend: str) -> str:
    """The compiler's version line.

    Raises:
        CompilerError: if there is none, or if it is of another CUDA than torch.
    """
    command = [str(cuda_home() / "bin" / "nvcc")] if backend == "cuda" else cxx()
    try:
        lines = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompilerError(f"no compiler: {shlex.join(command)} --version fails; install one or set CXX") from error
    version = next((line for line in lines if "release" in line), lines[0]).strip()
    if backend == "cuda":
        check_same_cuda(version)
    return version


def cxx() -> list[str]:
    """The C++ compiler's command: $CXX, which may have options or a cache before it, else c++."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def check_same_cuda(version: str) -> None:
    """Raise CompilerError if nvcc is of another major version than torch's CUDA: the library would not load."""
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release and torch.version.cuda and release[1] != torch.version.cuda.split(".")[0]:
        raise CompilerError(
            f"nvcc is of CUDA {release[1]}.{release[2]}, torch of CUDA {torch.version.cuda}; load the module of CUDA "
            f"{torch.version.cuda.split('.')[0]}, or set CUDA_HOME to it"
        )


def cuda_home() -> Path:
    """The CUDA toolkit: $CUDA_HOME or $CUDA_PATH, else that of the nvcc on the path, else /usr/local/cuda.

    Raises:
        CompilerError: if it has no nvcc.
    """
    # cpp_extension's own CUDA_HOME is None in a CPU build of torch
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        homes = [Path(named)]
    else:
        found = shutil.which("nvcc")
        homes = [Path(found).parents[1], Path(found).resolve().parents[1]] if found else []
        homes.append(Path("/usr/local/cuda"))
    usable = [home for home in homes if os.access(home / "bin" / "nvcc", os.X_OK)]
    if not usable:
        raise CompilerError(f"no CUDA toolkit: {homes[0]}/bin/nvcc does not exist; load its module or set CUDA_HOME")
    # /usr/local/bin/nvcc may be a script or a link that belongs to a toolkit elsewhere
    return next((home for home in usable if (home / "include" / "cuda_runtime.h").exists()), usable[0])


def runtime_folders(home: Path) -> list[str]:
    """Folders of a toolkit in which a linker may find the CUDA runtime."""
    folders = [home / "lib64", home / "lib", home / "targets" / f"{platform.machine()}-linux" / "lib"]
    return [str(folder) for folder in folders if (folder / "libcudart.so").exists()]


def compile_kernels(backend: str, folder: Path, architectures: list[str]) -> None:
    """Compile and link a backend's library into a folder.

    Raises:
        RuntimeError: with the compiler's output.
        OSError: if what was built does not load.
    """
    from torch.utils import cpp_extension

    import hdscale.ops.operator  # noqa: F401  (defines the operators that the library has implementations of)

    link_flags = list(LINK_FLAGS[backend])
    if backend == "cuda":
        home = cuda_home()
        cpp_extension.CUDA_HOME = str(home)
        link_flags += [f"-L{path}" for path in runtime_folders(home)]
        if torch.version.cuda is None:
            make_stand_ins(folder / "stand_ins")
            link_flags.append(f"-L{folder / 'stand_ins'}")
    # named architectures keep cpp_extension from reading $TORCH_CUDA_ARCH_LIST, which may have some that do not compile
    try:
        cpp_extension.load(
            name=library_name(backend).removesuffix(".so"),
            sources=[str(SOURCE_FOLDER / name) for name in SOURCES[backend]],
            extra_cflags=FLAGS["cpp"] if backend == "cpp" else [],
            extra_cuda_cflags=[*FLAGS["cuda"], *nvcc_flags(architectures)],
            extra_ldflags=link_flags,
            build_directory=str(folder),
            with_cuda=backend == "cuda",
            is_python_module=False,
        )
    except OSError:
        # a CPU build of torch cannot load what it has just built for a GPU
        if backend != "cuda" or torch.version.cuda is not None or not (folder / library_name(backend)).exists():
            raise


def make_stand_ins(folder: Path) -> None:
    """Empty libraries with the names of torch's CUDA libraries."""
    folder.mkdir()
    for name in STAND_INS:
        file = f"lib{name}.so"
        command = [*cxx(), "-shared", f"-Wl,-soname,{file}", "-o", str(folder / file)]
        subprocess.run([*command, "-x", "c++", os.devnull], check=True)


if __name__ == "__main__":
    compile_kernels(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
