"""Make the nvcc of the environment's packages a toolkit that compilers find: `python -m tests.simulated_gpu.toolkit`.

The packages have the CUDA runtime under the name that programs load, and not under that which linkers look for.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path


def complete(home: Path) -> None:
    """Add the names that are missing from a toolkit."""
    for link, target in ((home / "lib64", "lib"), (home / "lib" / "libcudart.so", "libcudart.so.13")):
        if not link.is_symlink():
            link.symlink_to(target)


if __name__ == "__main__":
    complete(Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13")
