"""When the tier may be skipped: never on a machine that could have a CUDA environment."""

import subprocess
from types import SimpleNamespace

import pytest

import tests.simulated_gpu.environment as environment


@pytest.fixture
def no_environment(monkeypatch, tmp_path):
    """`make cuda-env` fails, whatever the machine."""
    monkeypatch.delenv("HDSCALE_CUDA_PYTHON", raising=False)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr="no torch==2.14.1")
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: failed)


def machine(monkeypatch, disk_gb, index):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk_gb * 1e9))
    monkeypatch.setattr(environment, "index_answers", lambda: index)


def test_with_disk_and_an_index_a_skip_is_a_failure(no_environment, monkeypatch):
    machine(monkeypatch, 21, True)
    with pytest.raises(pytest.fail.Exception, match="no torch==2.14.1"):
        environment.cuda_python()


@pytest.mark.parametrize(("disk_gb", "index", "reason"), [(19, True, "19 GB of disk"), (21, False, "no package index")])
def test_without_them_it_is_skipped_with_the_reason(no_environment, monkeypatch, disk_gb, index, reason):
    machine(monkeypatch, disk_gb, index)
    with pytest.raises(pytest.skip.Exception, match=reason):
        environment.cuda_python()


def test_an_index_that_does_not_answer(no_environment):
    assert not environment.index_answers()


def test_the_environment_pins_what_the_other_one_pins():
    """But for torch, and what only a CUDA build needs."""
    from tests.helpers.places import ROOT

    pins = {}
    for name in ("constraints.txt", "constraints-cuda.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        pins[name] = {line for line in lines if not line.startswith(("torch==", "nvidia-"))}
    assert pins["constraints.txt"] == pins["constraints-cuda.txt"]
