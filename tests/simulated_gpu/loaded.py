"""Inside a process on simulated GPUs: what torch's import starts, and the counters."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.simulated_gpu.build import COMPUTING, PROJECT, RUNTIME


def load() -> None:
    """torch's entry point, called when torch is imported: where numbers are wanted, the host computes its operators."""
    if os.environ.get("SIMULATED_GPU_MODE") != "compute":
        return
    folder = Path(os.environ["SIMULATED_GPU_FOLDER"])
    ctypes.CDLL(str(folder / COMPUTING)).simulated_gpu_compute()
    runtime().simulated_gpu_compute_with(ctypes.CDLL(str(folder / PROJECT)).simulated_gpu_project_kernel)
    # imports torch, which is nearly done importing itself
    from tests.simulated_gpu.computing import install

    install()


@cache
def runtime() -> ctypes.CDLL:
    """The library that stands in for CUDA; it is in the process already."""
    library = ctypes.CDLL(str(Path(os.environ["SIMULATED_GPU_FOLDER"]) / RUNTIME))
    library.simulated_gpu_counters.restype = ctypes.c_char_p
    return library


def counters() -> Counter[str]:
    """What was counted since the process began; see src/simulator.h for the names."""
    lines = runtime().simulated_gpu_counters().decode().splitlines()
    return Counter({name: int(times) for times, name in (line.split("\t") for line in lines)})


def counted(work: Callable[[], object]) -> Counter[str]:
    """What a piece of work counts."""
    before = counters()
    work()
    return counters() - before


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Every wait of the host inside the block, by call and place: `cudaStreamSynchronize at step.py:12 in step`."""
    found: Counter[str] = Counter()

    def note(call: bytes) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
        places = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in reversed(frames[-3:])]
        found[f"{call.decode()} at {', from '.join(places)}"] += 1

    listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(note)
    runtime().simulated_gpu_on_wait(listener)
    try:
        yield found
    finally:
        runtime().simulated_gpu_on_wait(None)
