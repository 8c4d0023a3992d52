"""Build and load the compiled kernels, so that no killed, failing or simultaneous build can break a later one.

A build runs in a temporary folder under a lock that the kernel frees when its holder dies. The folder is renamed when
the build is complete. Its name is `BACKEND-KEY-VARIANT`: the key stands for what decides the library's code and what it
is linked with (sources, flags, machine), the variant for where it was made (torch, compiler, architectures).

A whole build of the right key is used wherever it runs, whoever made it: one made on a login node for 8.0 and 9.0
serves an H100 whose node has no compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hdscale.errors import UserError, one_line
from hdscale.files import cache_folder, locked, package_root, write_json
from hdscale.ops.architectures import (
    ArchitectureError,
    capability_of,
    cuda_architectures,
    holds,
    visible_capabilities,
)
from hdscale.ops.compile import FLAGS, LINK_FLAGS, SOURCE_FOLDER, CompilerError, compiler_version, library_name


class BuildError(Exception):
    """The kernels cannot be built on this machine; the message is one line that says why."""


@dataclass(frozen=True)
class Build:
    """A whole build in the cache.

    Attributes:
        folder: its folder.
        backend: `cpp` or `cuda`.
        torch: the version of torch that it was made with.
        compiler: the compiler's version line.
        architectures: CUDA architectures; none of a C++ build.
        seconds: how long it took.
    """

    folder: Path
    backend: str
    torch: str
    compiler: str
    architectures: list[str]
    seconds: float

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.folder / library_name(self.backend)

    @property
    def of_this_torch(self) -> bool:
        """Whether it was made with this version of torch: its CPU build or its CUDA build, whichever."""
        return self.torch.split("+")[0] == torch.__version__.split("+")[0]

    def runs_here(self) -> bool:
        """Whether it has code for every GPU that is visible; where none is, for all that would be built for."""
        if self.backend != "cuda":
            return True
        wanted = visible_capabilities() or [capability_of(one) for one in cuda_architectures()]
        return all(holds(self.architectures, capability) for capability in wanted)


@dataclass(frozen=True)
class LoadedKernels:
    """Kernels registered with torch in this process.

    Attributes:
        build: where they come from.
        description: instruction set or architectures, compiler, and how long the build took.
        seconds: how long the build took, now or earlier.
    """

    build: Build
    description: str

    @property
    def seconds(self) -> float:
        return self.build.seconds


def kernel_folder() -> Path:
    """The folder of all builds, in hdscale's cache folder.

    Raises:
        BuildError: if the cache folder cannot be made or written.
    """
    try:
        return cache_folder() / "ops"
    except UserError as error:
        raise BuildError(str(error)) from error


def forced_cuda() -> bool:
    """Whether HDSCALE_FORCE_CUDA=1 asks for a CUDA build on a machine without a GPU (a login node)."""
    return os.environ.get("HDSCALE_FORCE_CUDA", "0") not in ("", "0")


def find_builds(backend: str) -> list[Build]:
    """The whole builds of these sources that run here, those of this torch first and the newest first.

    Raises:
        BuildError: if the cache folder cannot be written, or for a $TORCH_CUDA_ARCH_LIST that cannot be read.
    """
    found = []
    for record in kernel_folder().glob(f"{backend}-{_key(backend)}-*/build.json"):
        if "." in record.parent.name:
            continue  # a temporary folder, whole and about to be renamed, or left by a killed process
        try:
            build = Build(record.parent, backend, **json.loads(record.read_text()))
            found.append((build.of_this_torch, record.stat().st_mtime, str(record), build))
        except (OSError, ValueError, TypeError):
            continue  # another process removes it at this moment
    try:
        return [build for *_, build in sorted(found, reverse=True, key=lambda one: one[:3]) if build.runs_here()]
    except ArchitectureError as error:
        raise BuildError(str(error)) from error


def build_kernels(backend: str, force: bool = False) -> Build:
    """Build the kernels of `cpp` or `cuda`, unless there is a whole build of this torch that runs here.

    Args:
        backend: `cpp` or `cuda`.
        force: build them in any case.

    Raises:
        BuildError: if there is no compiler, for a compile error, or if the cache folder cannot be written.
    """
    found = [build for build in find_builds(backend) if build.of_this_torch]
    return found[0] if found and not force else _build(backend, force)


def load_kernels(backend: str) -> LoadedKernels:
    """Register kernels with torch: those of the cache, or if none runs here, of a new build.

    Raises:
        BuildError: if they cannot be built or loaded on this machine.
    """
    failures: list[str] = []
    try:
        for build in _candidates(backend):
            try:
                torch.ops.load_library(str(build.library))
            except (OSError, RuntimeError) as error:
                failures.append(f"{build.library} does not load: {reason_of(error)}")
            else:
                return LoadedKernels(build, _describe(build))
    except BuildError as error:
        failures.append(str(error))
    raise BuildError(failures[0])


def _candidates(backend: str) -> Iterator[Build]:
    """Builds to try in turn: of this torch, a new one, and of another torch, which the stable ABI lets run."""
    found = find_builds(backend)
    for build in found:
        if build.of_this_torch:
            yield build
    failure = None
    try:
        new = _build(backend)
        if new.folder not in [build.folder for build in found]:
            yield new
    except BuildError as error:
        failure = error
    for build in found:
        if not build.of_this_torch:
            yield build
    if failure is not None:
        raise failure


def _describe(build: Build) -> str:
    if build.backend == "cpp":
        name = ctypes.CDLL(str(build.library)).hdscale_cpu_kernels
        name.restype = ctypes.c_char_p
        detail = name().decode()
    else:
        detail = ", ".join(f"sm_{architecture.replace('.', '')}" for architecture in build.architectures)
    return f"{detail}, built in {build.seconds:.0f} s by {build.compiler}"


def reason_of(error: BaseException) -> str:
    """An error's message and those of its causes: of a library that does not load, the last is the telling one."""
    messages: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = one_line(str(current))
        if text and text not in messages:
            messages.append(text)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return ": ".join(messages)


def _build(backend: str, force: bool = False) -> Build:
    """This compiler's own build for these architectures; made now if there is none."""
    try:
        architectures = cuda_architectures() if backend == "cuda" else []
        compiler = compiler_version(backend)
    except (ArchitectureError, CompilerError) as error:
        raise BuildError(str(error)) from error
    variant = _digest(repr((torch.__version__, compiler, architectures)).encode())[:8]
    target = kernel_folder() / f"{backend}-{_key(backend)}-{variant}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock")):
            if force or not (target / "build.json").exists():  # else built by another process while this one waited
                _build_into(target, backend, compiler, architectures)
        return Build(target, backend, **json.loads((target / "build.json").read_text()))
    except OSError as error:
        raise BuildError(f"cannot write to {target.parent} ({error.strerror}); set HDSCALE_CACHE") from error


def _build_into(target: Path, backend: str, compiler: str, architectures: list[str]) -> None:
    """Build in a temporary folder and rename it to `target`, whose lock is ours."""
    for stale in target.parent.glob(f"{target.name}.tmp*"):  # made by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp", dir=target.parent))
    try:
        started = time.time()
        _compile(backend, folder, architectures)
        record = {
            "torch": torch.__version__,
            "compiler": compiler,
            "architectures": architectures,
            "seconds": round(time.time() - started, 1),
        }
        write_json(folder / "build.json", record, indent=None)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _key(backend: str) -> str:
    """Stands for what decides the code of a library, and what it is linked with."""
    parts = [repr((platform.machine(), FLAGS[backend], LINK_FLAGS[backend])).encode()]
    for path in sorted(SOURCE_FOLDER.iterdir()):
        parts += [path.name.encode(), path.read_bytes()]
    return _digest(b"\0".join(parts))[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _compile(backend: str, folder: Path, architectures: list[str]) -> None:
    # the package may be a checkout that is not installed, and ninja in a virtual environment that is not activated
    environment = dict(os.environ)
    for name, first in (("PYTHONPATH", package_root()), ("PATH", Path(sys.executable).parent)):
        environment[name] = os.pathsep.join(filter(None, [str(first), environment.get(name)]))
    command = [sys.executable, "-P", "-m", "hdscale.ops.compile", backend, str(folder), *architectures]
    _run(command, folder, environment)


TELLING = (
    r"\bundefined reference\b|\bcannot find -l",
    r"(?<!collect2: )\b(fatal )?error:|\bnvcc fatal",
    r"error",
    r".",
)
"""What a line of a compiler's output that says what is wrong looks like, best first."""


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command; raise BuildError with the telling line of its output if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if result.returncode:
        # the last lines of a traceback tell more than its first
        lines = [*result.stdout.splitlines(), *reversed(result.stderr.splitlines())]
        told = (line for sign in TELLING for line in lines if re.search(sign, line, re.IGNORECASE))
        raise BuildError(next(told, f"exit code {result.returncode} without a word").strip())
