"""Building the kernels: cached, locked, interrupted or failing builds, and what `hdscale doctor` and the benchmark
say."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdscale.bench.op import parse_shape
from hdscale.commands.cli import main
from hdscale.errors import UserError
from hdscale.ops import build
from hdscale.ops.backend import availability
from hdscale.ops.compile import CompilerError, check_same_cuda, cuda_home
from hdscale.ops.naive import Shape
from tests.helpers.pretended_gpus import pretend_gpus


def has_nvcc() -> bool:
    try:
        return bool(cuda_home())
    except CompilerError:
        return False


needs_compiler = pytest.mark.skipif(
    not availability("cpp").usable, reason=f"no C++ kernels here: {availability('cpp').reason}"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HDSCALE_CACHE", str(tmp_path))
    return tmp_path / "ops"


@pytest.fixture
def quick_compile(monkeypatch):
    """A compilation that only writes the library's name, and counts."""
    folders = []

    def compile(backend, folder, architectures):
        folders.append(folder)
        (folder / f"hdscale_{backend}.so").write_text("library")

    monkeypatch.setattr(build, "_compile", compile)
    return folders


def test_built_once_and_renamed_into_place(cache, quick_compile):
    first, second = build.build_kernels("cpp"), build.build_kernels("cpp")
    assert first == second and len(quick_compile) == 1
    assert first.library.exists() and "seconds" in json.loads((first.folder / "build.json").read_text())
    assert not quick_compile[0].exists()
    build.build_kernels("cpp", force=True)
    assert len(quick_compile) == 2


def version(monkeypatch, text):
    """Pretend that this is the compiler; None: that there is none."""

    def found(backend):
        if text is None:
            raise CompilerError("no compiler here")
        return text

    monkeypatch.setattr(build, "compiler_version", found)


def test_a_build_is_found_again_by_another_compiler_or_none(cache, quick_compile, monkeypatch):
    """Fails if the compiler is part of what is looked for, as it was."""
    first = build.build_kernels("cpp")
    for text in ("another compiler 1.0", None):
        version(monkeypatch, text)
        assert build.build_kernels("cpp") == first
    with pytest.raises(build.BuildError, match="no compiler here"):
        build.build_kernels("cpp", force=True)
    version(monkeypatch, "another compiler 1.0")
    assert build.build_kernels("cpp", force=True).folder != first.folder and first.library.exists()


@pytest.mark.parametrize("what", ["source", "FLAGS", "LINK_FLAGS"])
def test_another_source_or_flag_is_another_build(what, cache, quick_compile, monkeypatch, tmp_path):
    """Fails if sources, compiler flags or link flags are left out of the key: a mended library would not be built."""
    first = build.build_kernels("cpp")
    if what == "source":
        shutil.copytree(build.SOURCE_FOLDER, tmp_path / "csrc")
        (tmp_path / "csrc" / "cpu_ops.cpp").write_text("int changed;")
        monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path / "csrc")
    else:
        monkeypatch.setitem(getattr(build, what), "cpp", ["-changed"])
    assert build.find_builds("cpp") == [] and build.build_kernels("cpp").folder != first.folder


def test_a_login_nodes_build_serves_a_gpu_node(cache, quick_compile, monkeypatch):
    """Built for 8.0 and 9.0 where no GPU is; an H100's and an A40's node, without nvcc, use it. Another GPU does not.

    Fails if the architectures asked for are part of the key, or if `runs_here` does not look at them.
    """
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    version(monkeypatch, "nvcc 13.0")
    login = build.build_kernels("cuda")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    version(monkeypatch, None)
    for capability in ((9, 0), (8, 6)):
        pretend_gpus(monkeypatch, capability)
        assert build.build_kernels("cuda") == login
    pretend_gpus(monkeypatch, (9, 0), (7, 0))  # the kernels cannot use the second GPU, whatever they are built for
    assert build.build_kernels("cuda") == login
    pretend_gpus(monkeypatch, (9, 0), (10, 0))
    with pytest.raises(build.BuildError, match="no compiler here"):
        build.build_kernels("cuda")
    version(monkeypatch, "nvcc 13.0")
    both = build.build_kernels("cuda")
    assert both.architectures == ["9.0", "10.0"] and len(quick_compile) == 2


def test_a_build_of_another_torch_is_the_last_resort(cache, quick_compile, monkeypatch):
    """The stable ABI lets it run; where there is a compiler, this torch has its own."""
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(build, "_describe", lambda build: "")
    older = build.build_kernels("cpp")
    record = json.loads((older.folder / "build.json").read_text())
    (older.folder / "build.json").write_text(json.dumps(record | {"torch": "2.11.0+cu130"}))
    version(monkeypatch, None)
    assert build.load_kernels("cpp").build.folder == older.folder and len(quick_compile) == 1
    version(monkeypatch, "a compiler")
    assert build.load_kernels("cpp").build.of_this_torch and len(quick_compile) == 2
    assert loaded[0] == str(older.library) != loaded[1]


def test_a_build_that_does_not_load_is_replaced_or_explained(cache, quick_compile, monkeypatch):
    """A library made for another system: this node builds its own, and says why if that does not load either.

    Fails if the cause of torch's error is left out, which alone names the missing symbol.
    """
    version(monkeypatch, "the other node's compiler")
    build.build_kernels("cpp")
    version(monkeypatch, "a compiler")
    with pytest.raises(build.BuildError, match=r"does not load: Could not load this library.*(file too short|invalid)"):
        build.load_kernels("cpp")
    assert len(quick_compile) == 2


def test_what_a_killed_build_left_is_cleared_away(cache, quick_compile):
    target = build.build_kernels("cpp").folder
    torn = cache / f"{target.name}.tmpdead"
    torn.mkdir()
    (torn / "lock").write_text("left by a killed build")
    (torn / "build.json").write_text((target / "build.json").read_text())  # killed just before the folder was renamed
    (target / "build.json").unlink()  # not whole: no record
    assert build.build_kernels("cpp").folder == target
    assert len(quick_compile) == 2 and not torn.exists() and (target / "build.json").exists()


def test_waits_for_a_build_under_way_and_takes_its_result(cache, quick_compile):
    target = build.build_kernels("cpp").folder
    record = (target / "build.json").read_text()
    (target / "build.json").unlink()
    code = "from hdscale.ops.build import build_kernels; print('ready', flush=True); build_kernels('cpp')"
    with open(target.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert waiter.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(timeout=1.5)
        (target / "build.json").write_text(record)
    assert waiter.wait(timeout=60) == 0
    # nothing is faked in the waiting process: had it compiled, the library would be a real one
    assert (target / "hdscale_cpp.so").read_text() == "library"


def test_a_failing_compilation_leaves_nothing_and_says_why(cache, monkeypatch):
    def compile(backend, folder, architectures):
        build._run([sys.executable, "-c", "print('x.cpp:1: error: no such thing'); raise SystemExit(1)"], folder)

    monkeypatch.setattr(build, "_compile", compile)
    with pytest.raises(build.BuildError, match="x.cpp:1: error: no such thing"):
        build.build_kernels("cpp")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


FALLBACK = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from hdscale.ops import generated_adapter
from hdscale.ops.cases import random_case
from hdscale.ops.compile import CompilerError, check_same_cuda, cuda_home
from hdscale.ops.naive import Shape
case = random_case(Shape(B=2, T=3, D=16, A=4, K=8), torch.float32)
for _ in range(3):
    generated_adapter(case.x[0], case.code[0], case.heads)
"""


def test_without_a_compiler_it_warns_once_and_computes(tmp_path):
    environment = os.environ | {"HDSCALE_CACHE": str(tmp_path), "CXX": "no-such-compiler"}
    result = subprocess.run([sys.executable, "-c", FALLBACK], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1 and "no-such-compiler --version fails" in warnings[0]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HDSCALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="set data.cache or HDSCALE_CACHE"):
        build.build_kernels("cpp")


COMPILER_OUTPUT = """
RuntimeError: Error building extension 'hdscale_cuda': [1/2] nvcc -c cuda_ops.cu
FAILED: hdscale_cuda.so
/usr/bin/ld: cannot find -lcudart: No such file or directory
collect2: error: ld returned 1 exit status
"""


def test_the_telling_line_of_a_compilers_output(tmp_path):
    """Not the traceback around it, nor that the linker has failed. Fails with the first line that has `error` in it."""
    with pytest.raises(build.BuildError, match="cannot find -lcudart"):
        build._run([sys.executable, "-c", f"import sys; sys.exit({COMPILER_OUTPUT!r})"], tmp_path)


def test_an_error_is_told_with_its_causes():
    try:
        try:
            raise OSError("undefined symbol: aoti_torch_dtype_float32")
        except OSError as cause:
            raise OSError("Could not load this library") from cause
    except OSError as error:
        assert build.reason_of(error) == "Could not load this library: undefined symbol: aoti_torch_dtype_float32"


def test_nvcc_of_another_cuda_than_torch(monkeypatch):
    """Its library would want a CUDA runtime that torch does not have."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(CompilerError, match=r"nvcc is of CUDA 12.4, torch of CUDA 13.0; load the module of CUDA 13"):
        check_same_cuda("Cuda compilation tools, release 12.4, V12.4.131")
    check_same_cuda("Cuda compilation tools, release 13.1, V13.1.2")
    monkeypatch.setattr(torch.version, "cuda", None)  # a CPU build: whatever the login node has
    check_same_cuda("Cuda compilation tools, release 12.4, V12.4.131")


def test_the_compiling_process_finds_the_package_and_ninja(tmp_path, monkeypatch):
    """From a checkout that is not installed, with an environment that is not activated.

    Fails if PYTHONPATH or PATH is left as it is: the process runs in another folder.
    """
    (tmp_path / "hdscale").mkdir()
    (tmp_path / "hdscale" / "__init__.py").write_text("")
    monkeypatch.setattr(build, "package_root", lambda: tmp_path)
    calls = []
    monkeypatch.setattr(build, "_run", lambda *arguments: calls.append(arguments))
    build._compile("cpp", tmp_path, [])
    _, folder, environment = calls[0]
    code = "import hdscale; print(hdscale.__file__)"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert result.stdout.strip() == str(tmp_path / "hdscale" / "__init__.py")
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


@needs_compiler
def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["backends"]["cpp"]["state"] == "usable" and findings["backends"]["cpp"]["seconds"] > 0
    assert findings["active"]["cpu"] == "cpp"
    if not torch.cuda.is_available():
        assert findings["active"]["cuda"] == "none" and findings["backends"]["cuda"]["state"] in (
            "unusable",
            "built",
            "loaded",
        )
    assert main(["doctor"]) == 0
    assert "method.backend=auto uses:\n  on a CPU: cpp\n" in capsys.readouterr().out


def test_doctor_without_a_compiler(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor", "--build"]) == 1
    out = capsys.readouterr().out
    assert "no-such-compiler --version fails" in out and "on a CPU: torch\n" in out


# ---- under a CUDA build of torch, with or without a GPU ---------------------------------------------------

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None or not has_nvcc(), reason="needs a CUDA build of torch, and nvcc"
)


@needs_cuda_build
def test_the_cuda_library_loads_and_is_found_without_nvcc(cache, monkeypatch, capsys):
    """Fails if the library does not name torch's libraries: torch loads them privately, and nothing else finds them.

    In processes of their own: a library can be loaded once.
    """
    environment = os.environ | {"HDSCALE_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5;8.0 Hopper", "MAX_JOBS": "1"}
    doctor = [sys.executable, "-m", "hdscale", "doctor", "--json"]
    found = json.loads(subprocess.run([*doctor, "--build"], env=environment, capture_output=True, check=True).stdout)
    assert found["backends"]["cuda"]["state"] in ("loaded", "usable"), found
    environment = os.environ | {"CUDA_HOME": "/nonexistent"}
    found = json.loads(subprocess.run(doctor, env=environment, capture_output=True, check=True).stdout)
    assert found["backends"]["cuda"]["state"] in ("loaded", "usable"), found


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None or not has_nvcc(), reason="needs a CPU build of torch, and nvcc")
def test_a_cpu_build_of_torch_builds_for_a_gpu_node(cache, monkeypatch):
    """What it makes needs torch's CUDA libraries by name, which this machine lacks. Fails without the stand-ins."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    library = build.build_kernels("cuda").library
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cuda.so" in needed and "libtorch_cpu.so" in needed
    with pytest.raises(build.BuildError, match=r"does not load: .*libc10_cuda.so: cannot open shared object file"):
        build.load_kernels("cuda")


def test_shapes_of_the_benchmark():
    assert parse_shape("large,batch=128,tokens=3") == Shape(B=128, T=3, D=1024, A=64, K=128, N=24)
    assert parse_shape("d=64,a=8,k=16,layers=2") == Shape(B=32, T=4, D=64, A=8, K=16, N=2)
    with pytest.raises(UserError, match="did you mean 'large'"):
        parse_shape("larg")
    with pytest.raises(UserError, match="is not a shape"):
        parse_shape("large,batch=0")
