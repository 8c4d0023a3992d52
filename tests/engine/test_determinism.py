"""`train.deterministic`: set before anything is computed, and what it cannot do is said in one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hdscale.engine.determinism import WORKSPACE_VARIABLE, faster_algorithms, operators_are_named, prepare_determinism
from hdscale.errors import UserError
from tests.helpers.places import ROOT


@pytest.fixture
def torch_as_before():
    """Torch's choice of algorithms is put back after a test."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.backends.cudnn.deterministic = False


def test_what_is_set(torch_as_before):
    environ: dict[str, str] = {}
    prepare_determinism(environ)
    assert environ == {WORKSPACE_VARIABLE: ":4096:8"}
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with faster_algorithms():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("value, accepted", [(":16:8", True), (":4096:8", True), (":4096:2:16:8", False), ("", False)])
def test_workspaces_that_the_environment_sets(value, accepted, torch_as_before):
    if accepted:
        prepare_determinism(environ := {WORKSPACE_VARIABLE: value})
        assert environ[WORKSPACE_VARIABLE] == value
    else:
        with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=.* does not let cuBLAS be deterministic"):
            prepare_determinism({WORKSPACE_VARIABLE: value})


def test_an_operator_without_a_deterministic_algorithm_is_one_line(torch_as_before):
    """`put_` has none, on any device."""
    prepare_determinism({})
    with pytest.raises(UserError, match="train.deterministic=true: put_ has no deterministic") as caught:
        with operators_are_named():
            torch.zeros(3).put_(torch.tensor([1]), torch.tensor([1.0]))
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="something else"), operators_are_named():
        raise RuntimeError("something else")


RECORDED = """
import os, sys
import torch
from hdscale import train as train_module
from hdscale.engine.determinism import WORKSPACE_VARIABLE
from hdscale.engine.ranks import Ranks

def started(*_, **__):
    # the process group and the GPU come first of all that computes
    print("at the start:", os.environ.get(WORKSPACE_VARIABLE), torch.are_deterministic_algorithms_enabled())
    raise SystemExit(0)

Ranks.start = started
train_module.run("configs/quickstart.yaml", sys.argv[1:])
"""


@pytest.mark.parametrize("value, said", [("true", "at the start: :4096:8 True"), ("false", "at the start: None False")])
def test_everything_is_set_before_the_gpu_is_touched(value, said):
    """Fails if the call is moved behind the start of the ranks, which is the first to touch the GPU."""
    environ = {name: text for name, text in os.environ.items() if name != WORKSPACE_VARIABLE}
    command = [sys.executable, "-c", RECORDED, f"train.deterministic={value}"]
    found = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert said in found.stdout, found.stderr
