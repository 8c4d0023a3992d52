"""Building the kernels: cached, locked, interrupted or failing builds, and what `hdscale doctor` and the benchmark
say."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch

from hdscale.bench.op import parse_shape
from hdscale.commands.cli import main
from hdscale.errors import UserError
from hdscale.ops import build
from hdscale.ops.backend import availability
from hdscale.ops.naive import Shape

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

    def compile(backend, folder, compiler):
        folders.append(folder)
        (folder / "hdscale_cpp.so").write_text("library")

    monkeypatch.setattr(build, "_compile", compile)
    return folders


def test_built_once_and_renamed_into_place(cache, quick_compile):
    first, second = build.build_kernels("cpp"), build.build_kernels("cpp")
    assert first == second and len(quick_compile) == 1
    assert (first / "hdscale_cpp.so").exists() and "seconds" in json.loads((first / "build.json").read_text())
    assert not quick_compile[0].exists()
    build.build_kernels("cpp", force=True)
    assert len(quick_compile) == 2


def test_another_compiler_or_source_is_another_build(cache, quick_compile, monkeypatch):
    first = build.build_kernels("cpp")
    monkeypatch.setattr(build, "_compiler", lambda backend: "another compiler 1.0")
    assert build.build_kernels("cpp") != first


def test_what_a_killed_build_left_is_cleared_away(cache, quick_compile):
    target = build.build_kernels("cpp")
    torn = cache / f"{target.name}.tmpdead"
    torn.mkdir()
    (torn / "lock").write_text("left by a killed build")
    (target / "build.json").unlink()  # not whole: no record
    assert build.build_kernels("cpp") == target
    assert len(quick_compile) == 2 and not torn.exists() and (target / "build.json").exists()


def test_waits_for_a_build_under_way_and_takes_its_result(cache, quick_compile):
    target = build.build_kernels("cpp")
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
    def compile(backend, folder, compiler):
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


def test_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert build.cuda_architectures() == ["8.0", "9.0+PTX"]


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
        )
    assert main(["doctor"]) == 0
    assert "method.backend=auto uses:\n  on a CPU: cpp\n" in capsys.readouterr().out


def test_doctor_without_a_compiler(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor", "--build"]) == 1
    out = capsys.readouterr().out
    assert "no-such-compiler --version fails" in out and "on a CPU: torch\n" in out


def test_shapes_of_the_benchmark():
    assert parse_shape("large,batch=128,tokens=3") == Shape(B=128, T=3, D=1024, A=64, K=128, N=24)
    assert parse_shape("d=64,a=8,k=16,layers=2") == Shape(B=32, T=4, D=64, A=8, K=16, N=2)
    with pytest.raises(UserError, match="did you mean 'large'"):
        parse_shape("larg")
    with pytest.raises(UserError, match="is not a shape"):
        parse_shape("large,batch=0")
