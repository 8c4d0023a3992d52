"""Makes this folder anew, with the code of hdscale 0.1: see README.md beside this file."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import hdscale
from hdscale import train
from hdscale.engine.deepspeed_engine import Engine

HERE = Path(__file__).resolve().parent
REPOSITORY = Path(hdscale.__file__).resolve().parents[1]
OVERRIDES = [
    "model.dropout=0.05",
    "method.encoder.dim=4",
    "method.decoder.dim=4",
    "method.hypernet.bottleneck=4",
    "method.hypernet.layer_embedding=2",
    "method.hypernet.mlp=false",
    "train.max_steps=120",
    "train.warmup_steps=10",
    "train.learning_rate=1e-2",
    "train.global_batch_size=32",
    "train.micro_batch_size=16",
    "train.checkpoint_every=50",
    "train.keep_checkpoints=1",
    "train.log_every=5",
    "eval.every=50",
    "eval.limit=16",
    "eval.test_limit=16",
    "run.dir=runs",
    "data.cache=cache",
]
INTERRUPTED_AFTER = 100


def make(name: str) -> None:
    """Train a run in the current folder, whole or up to its interruption, and copy what it leaves to here."""
    interrupted, step_of = name == "interrupted", Engine.train_step

    def step(engine, *arguments, **options):
        result = step_of(engine, *arguments, **options)
        if interrupted and engine.step == INTERRUPTED_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Engine.train_step = step
    config = str(REPOSITORY / "configs/quickstart.yaml")
    code = train.run(argparse.Namespace(config=config, overrides=[*OVERRIDES, f"run.name={name}"], fresh=False))
    assert code == (75 if interrupted else 0), code
    shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copytree(Path("runs") / name, HERE / name, ignore=shutil.ignore_patterns(".lock", "tensorboard"))
    if not interrupted:
        # the tests resume the other run
        shutil.rmtree(HERE / name / "checkpoints")


if __name__ == "__main__":
    platform.node = lambda: "host"
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        make(sys.argv[1])
