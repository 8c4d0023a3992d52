"""Training steps of real size, compiled (`train.compile`) and packed (`model.packing`)."""

from __future__ import annotations

import time
from pathlib import Path

from hdscale.bench.engine_step import counted_flops, glue_batch, measure_step, random_engine, step_config
from hdscale.doctor.gpu.lines import Lines
from hdscale.doctor.gpu.step import ROWS, SIZES, STEPS, TOKENS, alone, base_of, describe, peak_of


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `compile`."""
    ranks = alone()
    peak = peak_of(lines, ranks)
    for size in SIZES:
        batches = glue_batch(size, ROWS, TOKENS)
        # of the padded step: packing leaves the padding's operations out
        flops = 0
        with lines.check(f"{size}, compiled") as found, random_engine(step_config(size), ranks) as engine:
            flops = counted_flops(engine, batches)
            base_of(engine.module).compile_steps()
            began = time.perf_counter()
            engine.train_step(batches).result()
            seconds = time.perf_counter() - began
            describe(found, size, "compiled", measure_step(engine, batches, STEPS), flops, peak)
            found.say(f"{found.detail}; the first step took {seconds:.1f} s", compile_seconds=seconds)
        with (
            lines.check(f"{size}, packed") as found,
            random_engine(step_config(size, "model.packing=true"), ranks) as engine,
        ):
            describe(found, size, "packed", measure_step(engine, batches, STEPS), flops, peak)
    ranks.close()
