"""One rank of `hdscale bench scaling`: trains as `task.json` in the folder says, and counts what is communicated."""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hdscale.bench.options import RowOptions
from hdscale.bench.rows import make_rows
from hdscale.config import load_config
from hdscale.data.batches import Row, collate
from hdscale.data.micro_batches import deal
from hdscale.engine.deepspeed_engine import build_engine
from hdscale.engine.environment import read_environment
from hdscale.engine.ranks import Ranks
from hdscale.modeling import build_model
from hdscale.modeling.parameters import count_parameters
from hdscale.ops.precision import DTYPES
from hdscale.resolve import resolve

COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "_all_gather_base", "reduce_scatter",
    "reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all_single",
)  # fmt: skip


class Task(NamedTuple):
    """What a world trains: a global batch of so many rows, so many steps, after one that is not timed."""

    size: str
    dtype: str
    batch: int
    micro_batch_size: int
    steps: int
    threads: int


def task_rows(options: RowOptions, task: Task) -> list[Row]:
    """The rows of all steps."""
    return make_rows(options, task.batch * (task.steps + 1), task.size)


class CollectiveCounter:
    """Counts the calls of torch.distributed's collectives, and the bytes of their tensors, by collective.

    A call counts the larger side: the tensor that is reduced or broadcast, or the result of a gather.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inside = False

    def install(self) -> None:
        """Wrap torch.distributed's functions, in this process and until it ends."""
        for name in COLLECTIVES:
            if hasattr(dist, name):
                setattr(dist, name, self._counting(name, getattr(dist, name)))

    def reset(self) -> None:
        """Set all counts to zero."""
        self.bytes.clear()
        self.calls.clear()

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def count(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            try:
                self.bytes[name] += max(map(size_of, (*args, *kwargs.values())), default=0)
                self.calls[name] += 1
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return count


def size_of(value: Any) -> int:
    """Bytes of a tensor or of a list of tensors."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


def measure(
    ranks: Ranks, task: Task, rows: list[tuple[list[int], list[int]]], counter: CollectiveCounter
) -> dict[str, Any]:
    """Train; return the seconds of the slowest rank, and what this rank communicated in the last step.

    Args:
        rows: source and target of each row of all steps.
    """
    mixed = [Row(source, target, 0, str(index), "bench") for index, (source, target) in enumerate(rows)]
    config = load_config(
        None,
        [
            f"model.name={task.size}", "data.tasks=[quickstart]", f"train.global_batch_size={task.batch}",
            f"train.dtype={task.dtype}", f"deepspeed=ds_configs/zero2_{task.dtype}.json",
            "method.encoder.dim=64", "method.decoder.dim=64", "method.hypernet.bottleneck=128",
        ],
    )  # fmt: skip
    resolved = resolve(config, ranks.world_size)
    model = build_model(resolved.model, DTYPES[task.dtype], ranks.device, seed=0, trainable_dtype=torch.float32)
    trainable = count_parameters(model).trainable
    engine = build_engine(model, config.train, resolved.deepspeed, ranks, config.run.seed)
    seconds: list[float] = []
    for step in range(task.steps + 1):
        rows_of_step = mixed[step * task.batch : (step + 1) * task.batch]
        parts = deal(rows_of_step, ranks.world_size, task.micro_batch_size)[ranks.rank]
        batches = [collate(part, 0) for part in parts]
        ranks.barrier()
        counter.reset()
        start = time.perf_counter()
        engine.train_step(batches).result()
        seconds.append(time.perf_counter() - start)
    counted = {"bytes": dict(counter.bytes), "calls": dict(counter.calls)}
    slowest = [max(one) for one in zip(*ranks.gather_objects(seconds), strict=True)]
    engine.close()
    return {
        "ranks": ranks.world_size,
        "batch": task.batch,
        "micro_batches": len(parts),
        "seconds": statistics.median(slowest[1:]),
        "trainable": trainable,
        **counted,
    }


def main(folder: Path) -> int:
    described = json.loads((folder / "task.json").read_text())
    task = Task(**described["task"])
    counter = CollectiveCounter()
    counter.install()  # DeepSpeed keeps some of the functions as it finds them when it starts
    ranks = Ranks.start(read_environment(os.environ), task.threads, device="cpu")
    result = measure(ranks, task, described["rows"], counter)
    if ranks.is_main:
        (folder / "result.json").write_text(json.dumps(result))
    ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
