"""Small steps until asked to stop: what tests/engine/test_launcher.py starts with the real `deepspeed` launcher."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from hdscale.engine.checkpoint import load_newest_checkpoint, save_checkpoint  # noqa: E402
from hdscale.engine.preemption import Preemption  # noqa: E402
from hdscale.engine.ranks import Ranks  # noqa: E402
from hdscale.errors import EXIT_PREEMPTED  # noqa: E402
from hdscale.runs.log import RunLog  # noqa: E402
from tests.helpers.toy import BATCH, ToyModel, micro_batches, settings, toy_engine  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("folder")
    folder = Path(parser.parse_args().folder)
    ranks = Ranks.start()
    config = settings(max_steps=100_000)
    with (
        RunLog(folder, config.run, config.train.log_every, active=ranks.is_main, memory=ranks.memory_gb) as log,
        Preemption(ranks) as preemption,
    ):
        (folder / f"rank{ranks.rank}.pid").write_text(str(os.getpid()))
        engine = toy_engine(ToyModel(), config, ranks)
        load_newest_checkpoint(engine, folder, log)
        log.start(engine.step, config.train.max_steps)
        while not preemption.agreed():
            result = engine.train_step(micro_batches(engine.step, ranks.rank, ranks.world_size, BATCH)).result()
            log.step(result, samples=engine.step, tokens=engine.step, seconds=float(engine.step))
            time.sleep(0.02)
        save_checkpoint(engine, folder, {})
        log.info(f"{ranks.launcher}: stopped by {preemption.reason}")
        for _ in range(3):
            # the launcher's pipes are gone with it; what is printed now must not keep a rank from its exit code
            print("leaving", flush=False)
        (folder / f"rank{ranks.rank}.left").write_text("saved")
    return EXIT_PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
