"""`hdscale bench scaling`: 1 and 2 real ranks under DeepSpeed here, what they say to each other, and what that predicts elsewhere.

Each world is a set of processes of its own with equally many threads a rank, training the same rows twice: with the global batch fixed
(strong scaling) and with each rank's share fixed (weak scaling). Bytes are counted where torch.distributed is called and compared with
ZeRO-2's arithmetic. The prediction for GPUs is one: nothing of it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hdscale.bases.base import BUILT_IN
from hdscale.bench.report import add_report_arguments, progress, publish
from hdscale.bench.rows import add_row_arguments, check_sizes
from hdscale.bench.scaling_rank import Task, task_rows
from hdscale.bench.variants import hyperdecoder_settings, trainable_parameters
from hdscale.engine.ranks import free_port
from hdscale.errors import UserError, nearest
from hdscale.modeling import build_model

BITS = {"fp32": 4, "bf16": 2}
PATIENCE = 1800.0
"""Seconds after which a world is given up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="t5-v1_1-small", help="built-in size that is trained here")
    parser.add_argument("--dtype", choices=sorted(BITS), default="fp32")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="worlds that are started")
    parser.add_argument(
        "--global-batch-size",
        type=int,
        default=32,
        help="of the strong scaling; also each rank's share of the weak one",
    )
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    guess = parser.add_argument_group("the prediction's assumptions")
    guess.add_argument("--predict-size", default="t5-v1_1-large", help="built-in size")
    guess.add_argument("--predict-batch", type=int, default=16, help="rows of each GPU")
    guess.add_argument("--predict-tokens", type=int, default=48, help="source tokens of a row, as GLUE's mean")
    guess.add_argument("--tflops", type=float, default=300.0, help="that a GPU reaches in bf16")
    guess.add_argument(
        "--nvlink", type=float, default=200.0, metavar="GB/S", help="of each GPU to the others of its node"
    )
    guess.add_argument("--infiniband", type=float, default=25.0, metavar="GB/S", help="of each node to the others")
    guess.add_argument("--latency", type=float, default=30.0, metavar="MICROSECONDS", help="of one collective")
    add_row_arguments(parser)
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check(args)
    measured = []
    for ranks in args.ranks:
        for kind, batch in (
            ("fixed global batch", args.global_batch_size),
            ("fixed share", args.global_batch_size * ranks),
        ):
            if ranks == args.ranks[0] and kind == "fixed share" and batch == args.global_batch_size:
                measured.append(measured[-1] | {"what": kind})
                continue
            progress(f"{ranks} ranks, {kind}: {args.steps} steps of {batch} rows")
            measured.append({"what": kind} | world(args, ranks, batch))
    heard = max(measured, key=lambda row: row["ranks"])
    publish(
        f"scaling, {args.size}, {args.dtype}, {args.lengths} lengths, {args.threads} threads a rank, ZeRO-2 on cpu",
        table(measured),
        args,
        torch.device("cpu"),
        bytes_of_a_step_and_rank=heard["bytes"],
        collectives_of_a_step_and_rank=heard["calls"],
        by_arithmetic=arithmetic(heard, args),
        predicted_not_measured=predictions(args),
    )
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise UserError for what cannot be measured or predicted with."""
    check_sizes(args, "global_batch_size", "micro_batch_size", "steps", "threads", "predict_batch", "predict_tokens")
    if args.predict_size not in BUILT_IN:
        raise UserError(f"--predict-size {args.predict_size}{nearest(args.predict_size, BUILT_IN)}")
    for name in ("tflops", "nvlink", "infiniband"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name)} must be above 0")
    if args.latency < 0:
        raise UserError(f"--latency {args.latency} must be at least 0")
    for ranks in args.ranks:
        if ranks < 1 or args.global_batch_size % ranks:
            raise UserError(f"--ranks {ranks}: --global-batch-size {args.global_batch_size} must be a multiple of it")


def world(args: argparse.Namespace, ranks: int, batch: int) -> dict[str, Any]:
    """Train in so many processes; what the first rank measured.

    Raises:
        UserError: if a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        task = Task(args.size, args.dtype, batch, args.micro_batch_size, args.steps, args.threads)
        rows = [[row.input_ids, row.labels] for row in task_rows(args, task)]
        (place / "task.json").write_text(json.dumps({"task": task._asdict(), "rows": rows}))
        port, began = free_port(), time.monotonic()
        processes = [started(place, rank, ranks, port, args.threads) for rank in range(ranks)]
        try:
            # a rank that fails leaves the others waiting for it
            while any(process.poll() is None for process in processes) and not any(
                process.poll() for process in processes
            ):
                if time.monotonic() - began > PATIENCE:
                    raise UserError(
                        f"{ranks} ranks took more than {PATIENCE:.0f} s; use fewer --steps or a smaller --size"
                    )
                time.sleep(0.1)
            for rank, process in enumerate(processes):
                if process.poll():
                    lines = (place / f"rank{rank}.log").read_text().strip().splitlines() or ["no output"]
                    raise UserError(f"rank {rank} of {ranks} failed: {lines[-1]}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads((place / "result.json").read_text())


def started(place: Path, rank: int, ranks: int, port: int, threads: int) -> subprocess.Popen[bytes]:
    """One rank as a process."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_"))
    }
    environment |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    with (place / f"rank{rank}.log").open("wb") as log:
        command = [sys.executable, "-m", "hdscale.bench.scaling_rank", str(place)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def table(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a world; efficiency is samples a second of each rank against those of the smallest world of its kind."""
    rows = []
    for one in measured:
        first = next(other for other in measured if other["what"] == one["what"])
        speed, alone = (each["batch"] / each["seconds"] / each["ranks"] for each in (one, first))
        rows.append(
            {
                "what": one["what"],
                "ranks": one["ranks"],
                "batch": one["batch"],
                "micro_batches": one["micro_batches"],
                "seconds": one["seconds"],
                "samples/s": one["batch"] / one["seconds"],
                "efficiency": speed / alone,
                "MB_in_collectives": sum(one["bytes"].values()) / 1e6,
            }
        )
    return rows


def arithmetic(heard: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """ZeRO-2's own: every micro-batch's gradients are reduced in fp32, the updated weights are gathered once."""
    trainable, micro_batches = heard["trainable"], heard["micro_batches"]
    expected = trainable * (4 * micro_batches + BITS[args.dtype])
    counted = sum(heard["bytes"].values())
    return {
        "trainable": trainable,
        "micro_batches": micro_batches,
        "bytes": expected,
        "counted_over_expected": counted / expected,
    }


def predictions(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What 8 GPUs of a node and 8 nodes would lose to communication, none of it hidden behind computation.

    Gradients are all-reduced in float32, as is counted here, and weights gathered in bfloat16: a ring sends 2 (W-1)/W of the ones and
    (W-1)/W of the others from each rank. Computing is four operations for each weight of the frozen base and token (forward, and
    backward to its input).
    """
    config = hyperdecoder_settings(args.predict_size)
    model = build_model(config, device="meta")
    trainable = trainable_parameters(model)
    encoder, decoder = (
        sum(p.numel() for p in stack.parameters()) for stack in (model.base.encoder.block, model.base.decoder.block)
    )
    operations = (
        4.0 * args.predict_batch * (args.predict_tokens * encoder + 2 * (decoder + model.base.lm_head.weight.numel()))
    )
    computing = operations / (args.tflops * 1e12)
    found = []
    for name, ranks, bandwidth in (
        ("8 GPUs, NVLink", 8, args.nvlink),
        ("8 nodes of one GPU, InfiniBand", 8, args.infiniband),
    ):
        moved = (ranks - 1) / ranks * trainable * (2 * 4 + 2)
        speaking = moved / (bandwidth * 1e9) + 2 * args.latency * 1e-6
        found.append(
            {
                "on": name,
                "model": args.predict_size,
                "trainable": trainable,
                "assumed GB/s": bandwidth,
                "assumed TFLOP/s": args.tflops,
                "MB a step and rank": moved / 1e6,
                "ms computing": 1000 * computing,
                "ms communicating": 1000 * speaking,
                "efficiency": computing / (computing + speaking),
            }
        )
    return found
