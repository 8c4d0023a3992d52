"""Build the simulated GPUs for one CUDA build of torch: once, under a lock, for each state of the sources.

`python -m tests.simulated_gpu.build` with the Python of the CUDA environment builds for it, and prints the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hdscale.files import locked
from tests.helpers.places import ROOT

HERE = Path(__file__).parent
SOURCES = HERE / "src"
EMULATOR, KERNELS = HERE.parent / "helpers" / "emulator", ROOT / "hdscale" / "ops" / "csrc"
RUNTIME, COMPUTING, PROJECT = "libsimulated_gpu.so", "libcomputing.so", "libproject_kernels.so"
TORCH_LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so")
WANTED = re.compile(r"^(__)?(cuda|nccl|cublas|cu)[A-Z]\w*$")
"""Functions of CUDA, NCCL and cuBLAS. Those that no source defines get a stand-in that says its name and fails."""
DRIVER = re.compile(rb"\0(cu[A-Z]\w+)\0")
"""Names of the driver's functions, which torch looks up while it runs."""
MISSING = 'extern "C" int simulated_gpu_missing(const char*);\n'
ENTRY_POINT = "[torch.backends]\nsimulated_gpu = tests.simulated_gpu.loaded:load\n"


def torch_folder() -> Path:
    """Of this Python's torch, which is not imported."""
    found = importlib.util.find_spec("torch")
    assert found and found.origin, "no torch in this environment"
    return Path(found.origin).parent


def build() -> Path:
    """The folder of the libraries for this Python's torch.

    Raises:
        subprocess.CalledProcessError: if they do not compile; the compiler has printed why.
    """
    parts = [(torch_folder() / "version.py").read_bytes(), sys.version.encode(), Path(__file__).read_bytes()]
    parts += [path.name.encode() + path.read_bytes() for path in made_of()]
    target = ROOT / "build" / "simulated_gpu" / hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            folder = Path(tempfile.mkdtemp(dir=target.parent))
            try:
                build_into(folder)
                folder.rename(target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return target


def made_of() -> list[Path]:
    """All sources."""
    return sorted(path for folder in (SOURCES, EMULATOR, KERNELS) for path in folder.rglob("*.*") if path.is_file())


def build_into(folder: Path) -> None:
    """Compile everything into a folder."""
    compiler = os.environ.get("CXX", "g++").split()
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    folders = [
        packages / "cu13",
        packages / "nccl",
        *([Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []),
    ]
    includes = [f"-I{path / 'include'}" for path in folders]
    flags = ["-O2", "-std=c++17", "-fPIC", "-Wall", *includes]
    sources = ("counters", "devices", "memory", "streams", "kernels", "driver", "nccl", "cublas", "cublas_calls")
    torch_home = torch_folder()
    torch_flags = ["-std=c++20", f"-I{torch_home / 'include'}", f"-I{torch_home / 'include/torch/csrc/api/include'}"]
    torch_flags += [
        f"-L{torch_home / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch_cpu",
        "-ltorch_cuda",
        "-lc10",
        "-lc10_cuda",
    ]
    operators = [SOURCES / "compute" / "operators.cpp", "-o", folder / COMPUTING, *torch_flags]
    kernels = [SOURCES / "compute" / "project_kernels.cpp", "-o", folder / PROJECT, f"-I{EMULATOR}", f"-I{KERNELS}"]
    run_together(
        [
            [*compiler, *flags, "-O1", "-shared", *operators],
            [*compiler, *flags, "-Wno-unknown-pragmas", "-shared", *kernels],
            *([*compiler, *flags, "-c", SOURCES / f"{name}.cpp", "-o", folder / f"{name}.o"] for name in sources),
        ]
    )
    objects = [folder / f"{name}.o" for name in sources]
    have = {name for path in objects for name in symbols("--defined-only", path)}
    need = {
        name
        for library in TORCH_LIBRARIES
        for name in symbols("-D", "--undefined-only", torch_folder() / "lib" / library)
    }
    need |= {name.decode() for name in DRIVER.findall((torch_folder() / "lib" / "libc10_cuda.so").read_bytes())}
    missing = sorted(name for name in need - have if WANTED.match(name))
    lines = [f'extern "C" int {name}(...) {{ return simulated_gpu_missing("{name}"); }}\n' for name in missing]
    (folder / "missing.cpp").write_text(MISSING + "".join(lines))
    subprocess.run(
        [
            *compiler,
            "-O1",
            "-fPIC",
            "-shared",
            folder / "missing.cpp",
            *objects,
            "-o",
            folder / RUNTIME,
            "-lpthread",
            "-ldl",
        ],
        check=True,
    )
    for path in (*objects, folder / "missing.cpp"):
        path.unlink()
    # what is opened by name: torch opens NVML, Triton the driver
    (folder / "lib").mkdir()
    nvml = [SOURCES / "nvml.cpp", "-o", folder / "lib" / "libnvidia-ml.so.1"]
    subprocess.run([*compiler, *flags, "-shared", *nvml], check=True)
    (folder / "lib" / "libcuda.so.1").symlink_to(f"../{RUNTIME}")
    # torch calls this entry point when it is imported
    package = folder / "python" / "simulated_gpu-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated-gpu\nVersion: 0\n")
    (package / "entry_points.txt").write_text(ENTRY_POINT)


def run_together(commands: list[list[object]]) -> None:
    """Run commands side by side, and wait for all."""
    running = [(command, subprocess.Popen(list(map(str, command)))) for command in commands]
    for command, process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, list(map(str, command)))


def symbols(*arguments: object) -> list[str]:
    """Names that `nm` prints, without their versions."""
    lines = subprocess.run(["nm", *map(str, arguments)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[-1].split("@")[0] for line in lines if line.strip()]


if __name__ == "__main__":
    print(build())
