"""The architectures that the CUDA kernels are built for, and which GPUs a build runs on."""

import pytest

from hdscale.ops.architectures import ArchitectureError, cuda_architectures, holds, nvcc_flags
from tests.helpers.pretended_gpus import pretend_gpus


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", ["8.0", "9.0"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("5.2 6.0 6.1 7.0 7.5 8.0 8.6 9.0+PTX", ["8.0", "8.6", "9.0+PTX"]),  # as containers of CUDA 12 set it
        ("Volta;Hopper", ["9.0+PTX"]),
        ("Ampere+Tegra, 9.0a", ["8.0", "8.6+PTX", "9.0a"]),
        ("8.0 8.0", ["8.0"]),
    ],
)
def test_lists(listed, expected, monkeypatch):
    """Fails if an old architecture is kept, which fails the build as a whole, or if a name is not understood."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    pretend_gpus(monkeypatch)
    assert cuda_architectures() == expected


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("7.0 7.5", r"TORCH_CUDA_ARCH_LIST='7.0 7.5': the kernels need 8.0"),
        ("8.0 Hooper", "Hooper is no architecture.*did you mean 'Hopper'"),
    ],
)
def test_lists_that_cannot_be_used(listed, message, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    pretend_gpus(monkeypatch)
    with pytest.raises(ArchitectureError, match=message):
        cuda_architectures()


def test_the_gpu_that_is_here_is_built_for(monkeypatch):
    """Whatever the list of its container says. Fails if the list alone counts."""
    pretend_gpus(monkeypatch, (9, 0), (7, 5))
    for listed, expected in (("", ["9.0"]), ("8.0", ["8.0", "9.0"]), ("7.0", ["9.0"]), ("8.0+PTX", ["8.0+PTX"])):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert cuda_architectures() == expected


def test_what_a_build_runs_on():
    """Machine code within its generation from its number on, `a` on its own number alone, PTX on what is later."""
    assert holds(["8.0"], (8, 9)) and not holds(["8.9"], (8, 0)) and not holds(["8.0"], (9, 0))
    assert holds(["9.0a"], (9, 0)) and not holds(["10.0a"], (10, 3)) and holds(["10.0f"], (10, 3))
    assert holds(["8.0+PTX"], (12, 0)) and not holds(["9.0+PTX"], (8, 0)) and not holds([], (8, 0))


def test_flags():
    assert nvcc_flags(["8.0", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
