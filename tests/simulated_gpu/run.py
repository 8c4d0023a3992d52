"""Run a command on simulated GPUs: `PYTHON -m tests.simulated_gpu.run [--devices 2] [--compute] COMMAND …`.

PYTHON is that of an environment with a CUDA build of torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.helpers.places import ROOT
from tests.simulated_gpu.build import RUNTIME, build


def environment(
    folder: Path, devices: int = 1, capability: str = "9.0", compute: bool = False, memory_gb: int = 80
) -> dict[str, str]:
    """This process's environment with simulated GPUs in it.

    Args:
        folder: what `build` returns.
        devices: how many.
        capability: of each.
        compute: whether torch's operators compute (on the host), or kernels do nothing.
        memory_gb: of each.
    """
    found = {
        name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
    }
    found |= {
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder / "lib"), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "python")]),
        "SIMULATED_GPU_FOLDER": str(folder),
        "SIMULATED_GPU_COUNT": str(devices),
        "SIMULATED_GPU_CAPABILITY": capability,
        "SIMULATED_GPU_MODE": "compute" if compute else "idle",
        "SIMULATED_GPU_MEMORY_GB": str(memory_gb),
        # small products are compiled by Triton otherwise, which no host computes
        "TORCH_DISABLE_NATIVE_JIT": "1",
    }
    return found


def main() -> None:
    """Replace this process by the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--capability", default="9.0", help="8.0 is an A100, 9.0 an H100")
    parser.add_argument("--memory-gb", type=int, default=80)
    parser.add_argument("--compute", action="store_true", help="compute on the host; else kernels do nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    surroundings = environment(build(), args.devices, args.capability, args.compute, args.memory_gb)
    os.execvpe(args.command[0], args.command, surroundings)


if __name__ == "__main__":
    sys.exit(main())
