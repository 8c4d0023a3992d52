"""The project's CUDA library under a CUDA build of torch: built by nvcc, linked, loaded, registered, found again."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from tests.simulated_gpu.environment import toolkit
from tests.simulated_gpu.faults import unlink

pytestmark = pytest.mark.cuda

OPERATORS = ("generated_adapter", "generated_adapter_backward", "generated_adapter_heads_backward")
LOAD = """
import torch
from hdscale.ops.build import load_kernels
kernels = load_kernels("cuda")
has = torch._C._dispatch_has_kernel_for_dispatch_key
print([has(f"hdscale::{name}", "CUDA") for name in %r], kernels.build.architectures)
"""
LOADED = f"{[True] * len(OPERATORS)} ['8.0', '9.0']"


def folder_of(gpus):
    (record,) = gpus.cache.glob("ops/cuda-*/build.json")
    return record.parent


def test_the_library_names_torchs_libraries(gpus):
    """Fails without `--no-as-needed` and torch's libraries in the link: torch loads its own privately."""
    listed = subprocess.run(["readelf", "-d", folder_of(gpus) / "hdscale_cuda.so"], capture_output=True, text=True)
    needed = [line.split("[")[1].rstrip("]") for line in listed.stdout.splitlines() if "(NEEDED)" in line]
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed), needed
    assert [name for name in needed if name.startswith("libcudart.so")], needed


def test_it_loads_and_registers_without_a_gpu(gpus):
    """As on a login node."""
    done = gpus.without_gpus("-c", LOAD % (OPERATORS,))
    assert done.stdout.strip() == LOADED, done.stderr


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0"])
def test_a_login_nodes_build_is_used_on_a_gpu_without_nvcc(gpus, capability):
    """It holds code for 8.0 and 9.0. Fails if the architectures asked for or the compiler are part of its key."""
    done = gpus.run(("--capability", capability), "-c", LOAD % (OPERATORS,))
    assert done.stdout.strip() == LOADED, done.stderr
    assert len(list(gpus.cache.glob("ops/cuda-*/build.json"))) == 1


def test_doctor_on_a_simulated_gpu(gpus):
    """It names the GPU, and uses the library there."""
    done = gpus.run((), "-m", "hdscale", "doctor", "--json")
    found = json.loads(done.stdout)
    assert found["gpus"] == ["Simulated GPU 9.0"] and found["active"]["cuda"] == "cuda", done.stdout + done.stderr


def test_a_planted_library_that_does_not_load(gpus, tmp_path):
    """Linked without torch's libraries, it fails two of the tests above."""
    shutil.copytree(gpus.cache / "ops", tmp_path / "ops")
    faulty = replace(gpus, cache=tmp_path)
    unlink(folder_of(faulty), toolkit(gpus.python))
    with pytest.raises(AssertionError, match="undefined symbol"):
        test_it_loads_and_registers_without_a_gpu(faulty)
    with pytest.raises(AssertionError, match="libcudart"):
        test_the_library_names_torchs_libraries(faulty)
