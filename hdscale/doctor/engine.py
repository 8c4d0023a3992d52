"""`hdscale doctor --engine`: a step under each ZeRO stage and number type, its gradient checked, on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from hdscale.doctor.gpu.lines import Line, Lines, NotPossible, Wrong, read_lines
from hdscale.doctor.gpu.runs import KINDS, QUICK, train
from hdscale.engine.checks import SKIPPED

MOST_RANKS = 8
CPU_RANKS = 2
ROWS = 16
"""Of a rank: two passes of eight."""


def examine(begin: Callable[[str], None], say: Callable[[Line], None]) -> list[Line]:
    """One line for each ZeRO stage and number type: a step of the quick start with as many ranks as there are GPUs.

    Args:
        begin: called with the name of each check. say: called with its line.
    """
    gpus = torch.cuda.device_count()
    ranks = min(MOST_RANKS, gpus) if gpus else CPU_RANKS
    settings = ["train.max_steps=1", f"train.global_batch_size={ROWS * ranks}", f"train.micro_batch_size={ROWS // 2}"]
    found: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="hdscale-doctor-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        for kind in KINDS:
            for dtype in ("bf16", "fp32"):
                name = f"{kind}, {dtype}, {ranks} rank{'s' if ranks > 1 else ''}"
                begin(name)
                path = work / f"{len(found)}.jsonl"
                with Lines(path).check(name) as finding:
                    run = train(work, f"check{len(found)}", ranks, *QUICK, *settings, zero=kind, dtype=dtype)
                    run.finish()
                    told = run.log_lines("self-check")
                    if not told:
                        raise Wrong("the run's log says nothing of the self-check")
                    if told[0].startswith(SKIPPED):
                        raise NotPossible(told[0])
                    finding.say(told[0].removeprefix("self-check: "))
                found += read_lines(path)[0]
                say(found[-1])
    return found
