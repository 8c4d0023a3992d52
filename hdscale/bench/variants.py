"""What the benchmarks compare: this code, the same model computed as the paper's released code does, a plain adapter of
the same budget, and full fine-tuning; all with random weights, on the same rows.

All take AdamW steps without DeepSpeed, but otherwise as a run takes them: batches made ready before the step, copied
from pinned memory, gradients added up in float32, a fused AdamW on a GPU, no wait for the device in between.
How the released code computes is in `hdscale.bench.released`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from hdscale.bases.settings import ModelSettings
from hdscale.bench.released import ReleasedModel
from hdscale.data.batches import Row, collate
from hdscale.data.micro_batches import deal
from hdscale.modeling import HyperdecoderConfig, build_model
from hdscale.modeling.model import AdaptedModel
from hdscale.modeling.parameters import count_for
from hdscale.modeling.settings import HypernetSettings, MethodSettings, SideSettings
from hdscale.ops.precision import DTYPES

LEARNING_RATE = 3e-4


def hyperdecoder_settings(size: str, backend: Literal["auto", "torch"] = "auto") -> HyperdecoderConfig:
    """Table 1's hyperdecoder (64/64, bottleneck 128) on a built-in size."""
    return HyperdecoderConfig(
        ModelSettings(size),
        MethodSettings(
            "hyperdecoder",
            SideSettings("manual", 64),
            SideSettings("generated", 64),
            HypernetSettings(bottleneck=128),
            backend=backend,
        ),
    )


def adapter_settings(size: str, trainable: int) -> HyperdecoderConfig:
    """Plain adapters in both stacks, with a number of trainable parameters as near to `trainable` as sizes allow."""
    config = HyperdecoderConfig(
        ModelSettings(size), MethodSettings("adapter", SideSettings("manual", 1), SideSettings("manual", 1))
    )

    def count(dim: int) -> int:
        sized = copy.deepcopy(config)
        sized.method.encoder.dim = sized.method.decoder.dim = dim
        return count_for(sized).trainable

    one, two = count(1), count(2)
    dim = max(1, round((trainable - one) / (two - one)) + 1)
    config.method.encoder.dim = config.method.decoder.dim = dim
    return config


def static_bytes(variant: Variant) -> int:
    """Bytes of what a variant holds between steps: weights, float32 masters, AdamW's moments."""
    state = [tensor for slots in variant.optimizer.state.values() for tensor in slots.values()]
    kept = {id(tensor): tensor for tensor in (*variant.model.parameters(), *variant.masters, *state)}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


class GlobalBatch(NamedTuple):
    """What a run's feed makes ready while the step before runs: tensors of each pass, and the number of target
    tokens."""

    passes: list[dict[str, torch.Tensor]]
    tokens: int


@dataclasses.dataclass
class Variant:
    """A model, and how it trains on a global batch.

    Attributes:
        name: in the table.
        micro_batch_size: rows of one pass.
        sort_by_length: micro-batches of similar length in place of the batch's own order.
        released: the same weights in the released code's modules, if those compute.
        tokens_per_micro_batch: most tokens of a micro-batch, in place of rows.
    """

    name: str
    model: AdaptedModel
    dtype: torch.dtype
    micro_batch_size: int
    sort_by_length: bool = True
    released: ReleasedModel | None = None
    tokens_per_micro_batch: int | None = None

    def __post_init__(self) -> None:
        # masters in float32, as the engine keeps them: the step's cost is measured, not DeepSpeed's bookkeeping
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.trained]
        self.device = self.masters[0].device
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, weight_decay=0.0, fused=fused)

    def prepare(self, rows: Sequence[Row]) -> GlobalBatch:
        """A global batch, cut as this variant cuts it; for a GPU in pinned memory."""
        most_rows = None if self.tokens_per_micro_batch else self.micro_batch_size
        parts = deal(rows, 1, most_rows, self.sort_by_length, self.tokens_per_micro_batch)[0]
        passes = [collate(part, 0) for part in parts]
        if self.device.type == "cuda":
            passes = [{name: tensor.pin_memory() for name, tensor in one.items()} for one in passes]
        return GlobalBatch(passes, sum(len(row.labels) for row in rows))

    def on_device(self, batch: GlobalBatch) -> list[dict[str, torch.Tensor]]:
        """Its passes on the device; nothing waits for their copy."""
        return [
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in one.items()} for one in batch.passes
        ]

    def step(self, batch: GlobalBatch) -> torch.Tensor:
        """One optimizer step; the mean loss, which is still on the device."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for one in self.on_device(batch):
            loss = self.loss_sum(one) / batch.tokens
            loss.backward()
            self.add_gradients()
            total += loss.detach()
        self.update()
        return total

    def add_gradients(self) -> None:
        """Add a pass's gradients to the masters', in float32."""
        for master, parameter in zip(self.masters, self.trained, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def update(self) -> None:
        """Clip, AdamW on the float32 masters, copy back."""
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.trained, strict=True):
                parameter.copy_(master)
                master.grad = None

    def encode(self, input_ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """The encoder's part of a pass."""
        return (self.released or self.model).encode(input_ids, mask)

    def loss_of(self, encoded: Any, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The decoder's part of a pass: cross-entropy summed over target tokens."""
        if self.released is not None:
            return self.released.loss_of(encoded, mask, labels)
        logits, targets = self.model.decode(encoded, labels)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def loss_sum(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy summed over target tokens."""
        return self.model(**batch).loss_sum if self.released is None else self.released.loss_sum(batch)


def build_variants(
    size: str,
    dtype: str,
    micro_batch_size: int,
    global_batch_size: int,
    device: torch.device,
    only: Sequence[str],
    tokens_per_micro_batch: int | None = None,
) -> list[Variant]:
    """The variants, by name: hdscale, released-fp32, released-bf16, adapter, full."""

    # every model here has random weights on purpose: no warning for each
    logging.getLogger("hdscale.bases.loading").setLevel(logging.ERROR)

    def build(config: HyperdecoderConfig, kind: torch.dtype) -> AdaptedModel:
        return build_model(config, kind, device)

    ours = hyperdecoder_settings(size)
    # the released training loop has no accumulation on GLUE: one pass over the whole batch
    released = hyperdecoder_settings(size, backend="torch")

    def efficient(name: str, config: HyperdecoderConfig) -> Variant:
        kind = DTYPES[dtype]
        return Variant(name, build(config, kind), kind, micro_batch_size, tokens_per_micro_batch=tokens_per_micro_batch)

    def as_release(name: str) -> Variant:
        model = build(released, DTYPES[name])
        return Variant(
            f"released-{name}", model, DTYPES[name], global_batch_size, sort_by_length=False,
            released=ReleasedModel(model),
        )  # fmt: skip

    makers: dict[str, Callable[[], Variant]] = {
        "hdscale": lambda: efficient("hdscale", ours),
        "adapter": lambda: efficient("adapter", adapter_settings(size, count_for(ours).trainable)),
        "full": lambda: efficient("full", HyperdecoderConfig(ModelSettings(size), MethodSettings("full_finetuning"))),
    }
    for name in DTYPES:
        makers[f"released-{name}"] = partial(as_release, name)
    return [makers[name]() for name in only]
