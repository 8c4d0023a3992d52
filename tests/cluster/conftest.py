"""A real SLURM for the tests of a file."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster.cluster import ClusterUnavailable, SlurmCluster


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with a short name: munge's socket is in it."""
    with tempfile.TemporaryDirectory(prefix="hds", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def slurm(place: Path) -> Iterator[SlurmCluster]:
    """The cluster: 4 nodes of 64 cores, 8 GPUs and 512 GB, as far as SLURM knows."""
    cluster = SlurmCluster(place / "slurm")
    try:
        cluster.start()
    except ClusterUnavailable as error:
        cluster.stop()
        pytest.skip(f"no SLURM: {error}")
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    cluster.env |= variables | {"PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}"}
    yield cluster
    cluster.stop()
