"""A small partly frozen model with dropout, its data and settings, for the engine's tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from hdscale.engine.deepspeed_config import resolve_deepspeed_config
from hdscale.engine.deepspeed_engine import Engine, build_engine
from hdscale.engine.ranks import Ranks
from hdscale.engine.settings import TrainSettings
from hdscale.runs.settings import RunSettings

VOCABULARY = 23
WIDTH = 10  # the odd sizes below are not multiples of any number of ranks
BATCH = 8

# the settings with which a model is trained under each ZeRO stage
ZERO = {
    "zero1": {"deepspeed": "ds_configs/zero1_bf16.json", "dtype": "bf16"},
    "zero2": {"deepspeed": "ds_configs/zero2_bf16.json", "dtype": "bf16"},
    "offload": {"deepspeed": "ds_configs/zero2_offload_bf16.json", "dtype": "bf16"},
    "zero3": {"deepspeed": "ds_configs/zero3_bf16.json", "dtype": "bf16"},
    # every weight is partitioned: ZeRO-3 keeps those below its threshold whole, and here they are all small
    "zero3_small": {"deepspeed": "tests/helpers/zero3_no_persistent_bf16.json", "dtype": "bf16"},
}


class Row(NamedTuple):
    """What the engine names when a step fails."""

    task: str
    id: str


class ToyModel(nn.Module):
    """Frozen embedding and head, two trained bottlenecks that share a matrix, dropout between them."""

    def __init__(self, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 7)
        self.shared = nn.Parameter(torch.randn(7, 7) / 3)
        self.up = nn.Linear(7, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
        if dtype is not torch.float32:
            self.embedding.to(dtype), self.head.to(dtype)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.embedding(input_ids)
        inner = self.dropout(torch.relu(self.down(hidden.to(self.down.weight.dtype))))
        inner = self.dropout(torch.tanh(inner @ self.shared) @ self.shared)
        logits = self.head(hidden + self.up(inner)).float()
        loss_sum = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return loss_sum, (labels != -100).sum()


def settings(**train: object) -> SimpleNamespace:
    """The part of a run's configuration that the engine reads; `deepspeed` and `seed` are keys too."""
    deepspeed, seed = train.pop("deepspeed", None), train.pop("seed", 3)
    defaults = dict(max_steps=12, global_batch_size=BATCH, learning_rate=0.02, warmup_steps=2, dtype="fp32")
    return SimpleNamespace(
        train=TrainSettings(**{**defaults, **train}), deepspeed=deepspeed, run=RunSettings(seed=seed)
    )


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """The batch of a step: a function of the step alone. Rows have 1 to 5 target tokens."""
    generator = torch.Generator().manual_seed(1000 + step)
    input_ids = torch.randint(0, VOCABULARY, (BATCH, 5), generator=generator)
    labels = (input_ids * 3 + 1) % VOCABULARY
    lengths = torch.randint(1, 6, (BATCH, 1), generator=generator)
    return {"input_ids": input_ids, "labels": labels.masked_fill(torch.arange(5) >= lengths, -100)}


def micro_batches(step: int, rank: int, world_size: int, size: int) -> list[dict[str, torch.Tensor]]:
    """This rank's share of a step's batch, cut into micro-batches of `size` rows."""
    share = BATCH // world_size
    rows = {name: tensor[rank * share : (rank + 1) * share] for name, tensor in global_batch(step).items()}
    return [{name: tensor[at : at + size] for name, tensor in rows.items()} for at in range(0, share, size)]


def text_batch(generator: torch.Generator, source: int, target: int) -> dict[str, torch.Tensor]:
    """Two rows of random ids of two tasks, for a real model with a vocabulary of 64."""
    return {
        "input_ids": torch.randint(2, 64, (2, source), generator=generator),
        "attention_mask": torch.ones(2, source, dtype=torch.int64),
        "labels": torch.randint(2, 64, (2, target), generator=generator),
        "task_ids": torch.tensor([0, 1]),
    }


def toy_engine(model: nn.Module, config: SimpleNamespace, ranks: Ranks) -> Engine:
    """The model under DeepSpeed with `settings(...)`."""
    deepspeed = resolve_deepspeed_config(config.deepspeed, config.train, ranks.world_size)
    return build_engine(model, config.train, deepspeed, ranks, config.run.seed)
