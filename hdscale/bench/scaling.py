"""`hdscale bench scaling`: 1 and 2 real ranks under DeepSpeed, what they communicate, and a prediction for GPUs.

Each world is a separate set of processes with equally many threads per rank, training the same rows twice: with the
global batch fixed (strong scaling) and with each rank's share fixed (weak scaling). Bytes are counted where
torch.distributed is called and compared with ZeRO-2's arithmetic. The prediction for GPUs is arithmetic, not a
measurement.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hdscale.bench.options import ScalingOptions
from hdscale.bench.report import progress, publish
from hdscale.bench.rows import check_size
from hdscale.bench.scaling_rank import Task, task_rows
from hdscale.bench.variants import hyperdecoder_settings
from hdscale.engine.ranks import free_port
from hdscale.errors import UserError
from hdscale.modeling import build_model
from hdscale.modeling.parameters import count_parameters
from hdscale.ops.precision import DTYPES

LIMIT_SECONDS = 1800.0
"""Time after which a measurement fails."""


def run(options: ScalingOptions) -> None:
    """Train with each number of ranks, count what they communicate, and predict other machines."""
    check_size(options.size)
    check_size(options.predict_size, "--predict-size")
    measured: list[dict[str, Any]] = []
    for ranks in options.ranks:
        for kind, batch in (
            ("fixed global batch", options.global_batch_size),
            ("fixed share", options.global_batch_size * ranks),
        ):
            if ranks == options.ranks[0] and kind == "fixed share" and batch == options.global_batch_size:
                measured.append(measured[-1] | {"what": kind})
                continue
            progress(f"{ranks} ranks, {kind}: {options.steps} steps of {batch} rows")
            measured.append({"what": kind} | world(options, ranks, batch))
    largest = max(measured, key=lambda row: row["ranks"])
    publish(
        f"scaling, {options.size}, {options.dtype}, {options.lengths} lengths, {options.threads} threads per rank, "
        "ZeRO-2 on cpu",
        table(measured),
        options,
        torch.device("cpu"),
        bytes_per_step_and_rank=largest["bytes"],
        collectives_per_step_and_rank=largest["calls"],
        by_arithmetic=arithmetic(largest, options),
        predicted_not_measured=predictions(options),
    )


def world(options: ScalingOptions, ranks: int, batch: int) -> dict[str, Any]:
    """Train in so many processes; what the first rank measured.

    Raises:
        UserError: if a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        task = Task(options.size, options.dtype, batch, options.micro_batch_size, options.steps, options.threads)
        rows = [[row.input_ids, row.labels] for row in task_rows(options, task)]
        (place / "task.json").write_text(json.dumps({"task": task._asdict(), "rows": rows}))
        port, began = free_port(), time.monotonic()
        processes = [started(place, rank, ranks, port, options.threads) for rank in range(ranks)]
        try:
            # a rank that fails leaves the others waiting for it
            while any(process.poll() is None for process in processes) and not any(
                process.poll() for process in processes
            ):
                if time.monotonic() - began > LIMIT_SECONDS:
                    raise UserError(
                        f"{ranks} ranks took more than {LIMIT_SECONDS:.0f} s; use fewer --steps or a smaller --size"
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
    """One row per world size; efficiency is each rank's samples per second against the smallest world of its kind."""
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


def arithmetic(measured: dict[str, Any], options: ScalingOptions) -> dict[str, Any]:
    """ZeRO-2's communication by arithmetic, and the counted bytes as a multiple of it.

    The gradients of every micro-batch are reduced in float32; the updated weights are gathered once.
    """
    trainable, micro_batches = measured["trainable"], measured["micro_batches"]
    expected = trainable * (4 * micro_batches + DTYPES[options.dtype].itemsize)
    counted = sum(measured["bytes"].values())
    return {
        "trainable": trainable,
        "micro_batches": micro_batches,
        "bytes": expected,
        "counted_over_expected": counted / expected,
    }


def predictions(options: ScalingOptions) -> list[dict[str, Any]]:
    """What 8 GPUs of a node and 8 nodes would lose to communication, none of it hidden behind computation.

    Gradients are all-reduced in float32, as is counted here, and weights are gathered in bfloat16: in a ring of W
    ranks, each sends 2 (W-1)/W of the gradients' bytes and (W-1)/W of the weights'. Computation is four operations for
    each weight of the frozen base and each token (forward, and backward to its input).
    """
    config = hyperdecoder_settings(options.predict_size)
    model = build_model(config, device="meta")
    trainable = count_parameters(model).trainable
    encoder, decoder, head = (model.base.weights_per_token(part) for part in ("encoder", "decoder", "head"))
    operations = 4.0 * options.predict_batch * (options.predict_tokens * encoder + 2 * (decoder + head))
    computing = operations / (options.tflops * 1e12)
    found = []
    for name, ranks, bandwidth in (
        ("8 GPUs, NVLink", 8, options.nvlink),
        ("8 nodes of one GPU, InfiniBand", 8, options.infiniband),
    ):
        moved = (ranks - 1) / ranks * trainable * (2 * 4 + 2)
        communicating = moved / (bandwidth * 1e9) + 2 * options.latency * 1e-6
        found.append(
            {
                "on": name,
                "model": options.predict_size,
                "trainable": trainable,
                "assumed GB/s": bandwidth,
                "assumed TFLOP/s": options.tflops,
                "MB per step and rank": moved / 1e6,
                "ms computing": 1000 * computing,
                "ms communicating": 1000 * communicating,
                "efficiency": computing / (computing + communicating),
            }
        )
    return found
