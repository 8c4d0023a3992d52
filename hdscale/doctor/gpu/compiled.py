"""Training steps of real size, compiled (`train.compile`) and packed (`model.packing`)."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from hdscale.bench.engine_step import counted_flops, glue_batch, measure_step, random_engine, step_config
from hdscale.doctor.gpu.lines import Lines
from hdscale.doctor.gpu.step import ROWS, SIZES, STEPS, TOKENS, alone, base_of, describe, describe_mfu, peak_of


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `compile`."""
    ranks = alone()
    peak = peak_of(lines, ranks)
    for size in SIZES:
        batches = glue_batch(size, ROWS, TOKENS)
        measured = None
        with ExitStack() as held:
            with lines.check(f"{size}, compiled") as found:
                engine = held.enter_context(random_engine(step_config(size), ranks))
                engine.train_step(batches).result()
                base_of(engine.module).compile_steps()
                began = time.perf_counter()
                engine.train_step(batches).result()
                seconds = time.perf_counter() - began
                measured = measure_step(engine, batches, STEPS)
                describe(found, size, "compiled", measured)
                found.say(f"{found.detail}; the first step took {seconds:.1f} s", compile_seconds=seconds)
            if measured:
                with lines.check(f"{size}, compiled, MFU") as found:
                    base_of(engine.module).compile_steps(on=False)
                    describe_mfu(found, counted_flops(engine, batches), measured, peak)
        packed = step_config(size, "model.packing=true")
        with lines.check(f"{size}, packed") as found, random_engine(packed, ranks) as engine:
            # no share of the peak: the counter does not know FlexAttention
            describe(found, size, "packed", measure_step(engine, batches, STEPS))
    ranks.close()
