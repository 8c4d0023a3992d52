"""Simulated GPUs for the tests: everything is found or made once per session."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.places import ROOT
from tests.simulated_gpu.environment import cuda_python, toolkit

ARCHITECTURES = "8.0 9.0"


@dataclass(frozen=True)
class SimulatedGpus:
    """Starts processes under a CUDA build of torch.

    Attributes:
        python: of the CUDA environment.
        cache: HDSCALE_CACHE of the processes.
    """

    python: Path
    cache: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """That of a process in the CUDA environment, on a machine without a GPU and without nvcc."""
        kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_PATH", "DS_ACCELERATOR")}
        own = {
            "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join([str(self.python.parent), "/usr/bin", "/bin"]),
            "HDSCALE_CACHE": str(self.cache),
            "CUDA_HOME": "/nonexistent",
            "OMP_NUM_THREADS": "1",
        }
        return kept | own | variables

    def without_gpus(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python there, as on a login node."""
        command = [str(self.python), *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(**variables), capture_output=True, text=True, timeout=900
        )

    def run(self, options: tuple[str, ...], *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python there on simulated GPUs; `options` are those of `tests.simulated_gpu.run`."""
        return self.without_gpus("-m", "tests.simulated_gpu.run", *options, self.python, *arguments, **variables)

    def measure(self, size: str, capability: str = "9.0", **wanted: Any) -> dict[str, Any]:
        """The numbers of `tests.simulated_gpu.measure`; that nothing was wrong on the way is asserted."""
        request = json.dumps({"size": size, **wanted})
        done = self.run(("--capability", capability), "-m", "tests.simulated_gpu.measure", request)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout.rpartition("measured ")[2])
        assert found["faults"] == [], done.stderr
        return found


@pytest.fixture(scope="session")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> SimulatedGpus:
    """Processes on simulated GPUs, with the project's CUDA library built in their cache."""
    python = cuda_python()
    found = SimulatedGpus(python, tmp_path_factory.mktemp("cuda_cache"))
    home = str(toolkit(python))
    simulator = found.without_gpus("-m", "tests.simulated_gpu.build", CUDA_HOME=home)
    assert simulator.returncode == 0, simulator.stdout + simulator.stderr
    login_node = {"CUDA_HOME": home, "HDSCALE_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    build = "from hdscale.ops.build import build_kernels; build_kernels('cuda')"
    library = found.without_gpus("-c", build, **login_node)
    assert library.returncode == 0, library.stdout + library.stderr
    return found
