"""The hyperdecoder and the grid around it (Tables 8, 13): {none, manual, task, generated} in each of the two stacks.

The paper's method has learned adapters in the encoder and generated ones in the decoder. With learned adapters on both
sides it is the adapter baseline (A.1), with task-conditioned ones on both the task hypernet (A.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hdscale.errors import UserError, nearest
from hdscale.modeling.adaptation import Adaptation
from hdscale.modeling.adapters import ManualAdaptation, ManualAdapters
from hdscale.modeling.conditioning import EncodingEmbedding, masked_mean
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.hypernetwork import GeneratedAdaptation, Hypernetwork
from hdscale.modeling.methods.interface import Encode, Method
from hdscale.modeling.settings import SideSettings

KINDS = ("none", "manual", "task", "generated")


class Side(nn.Module):
    """What adapts one stack.

    Args:
        settings: kind, size and input of the adapters.
        config: base, method and tasks.
        d_model: D. layers: N of the stack.
        conditioned_twice: the stack's own first pass conditions it (an encoder with generated adapters), so it also
            has learned adapters for that pass.
    """

    def __init__(
        self, settings: SideSettings, config: HyperdecoderConfig, d_model: int, layers: int, conditioned_twice: bool
    ) -> None:
        super().__init__()
        self.kind = settings.adapter
        self.normed_input = settings.input == "layernorm"
        hypernet = config.method.hypernet
        if self.kind == "manual" or (self.kind == "generated" and conditioned_twice):
            self.adapters = ManualAdapters(d_model, layers, settings.dim)
        if self.kind == "task":
            self.task_embedding = nn.Embedding(len(config.tasks), d_model)
        if self.kind == "generated":
            self.embedding = EncodingEmbedding(d_model, hypernet.mlp)
        if self.kind in ("task", "generated"):
            self.hypernetwork = Hypernetwork(
                d_model,
                d_model,
                layers,
                settings.dim,
                hypernet.bottleneck,
                hypernet.layer_embedding,
                config.method.backend,
            )

    def manual(self) -> ManualAdaptation:
        """The learned adapters."""
        return ManualAdaptation(self.adapters, self.normed_input)

    def adaptation(self, e: Tensor | None) -> Adaptation | None:
        """The stack's adaptation for a batch with embeddings e [B, D] (None where nothing is conditioned)."""
        if self.kind == "none":
            return None
        if self.kind == "manual":
            return self.manual()
        return GeneratedAdaptation(self.hypernetwork.adapter_heads, self.hypernetwork(e), self.normed_input)

    def task_vector(self, task_ids: Tensor) -> Tensor:
        """Learned embeddings [B, D] of tasks; -1 is a task that was not trained on: the mean of all (Table 5)."""
        known = self.task_embedding(task_ids.clamp(min=0))
        mean = self.task_embedding.weight.mean(dim=0)
        return torch.where(task_ids.unsqueeze(-1) >= 0, known, mean)


class SidesMethod(Method):
    """Hyperdecoder (Sections 2.1-2.3) and every other cell of the grid of Tables 8 and 13."""

    def __init__(self, config: HyperdecoderConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        self.check(config)
        d_model = base.config.d_model
        method = config.method
        self.encoder = Side(method.encoder, config, d_model, base.config.num_layers, conditioned_twice=True)
        self.decoder = Side(method.decoder, config, d_model, base.config.num_decoder_layers, conditioned_twice=False)
        self.needs_tasks = "task" in (self.encoder.kind, self.decoder.kind)

    @classmethod
    def check(cls, config: HyperdecoderConfig) -> None:
        for name in ("encoder", "decoder"):
            side: SideSettings = getattr(config.method, name)
            if side.adapter not in KINDS:
                raise UserError(f"method.{name}.adapter={side.adapter}{nearest(side.adapter, KINDS)}")
            if side.input not in ("hidden", "layernorm"):
                raise UserError(f"method.{name}.input={side.input}{nearest(side.input, ['hidden', 'layernorm'])}")
            if side.adapter != "none" and side.dim < 1:
                raise UserError(f"method.{name}.dim={side.dim} must be at least 1")
            if side.adapter == "task" and not config.tasks:
                raise UserError(f"method.{name}.adapter=task needs the names of the tasks that it is trained on")
        if config.method.hypernet.bottleneck < 1:
            raise UserError(f"method.hypernet.bottleneck={config.method.hypernet.bottleneck} must be at least 1")
        if config.method.hypernet.conditioning != "mean":
            known = nearest(config.method.hypernet.conditioning, ["mean"])
            raise UserError(f"method.hypernet.conditioning={config.method.hypernet.conditioning}{known}")

    def encode(self, encode: Encode, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        side = self.encoder
        if side.kind == "generated":
            first_pass = encode(side.manual())
            return encode(side.adaptation(side.embedding(first_pass, mask)))
        return encode(side.adaptation(side.task_vector(task_ids) if side.kind == "task" else None))

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation | None:
        conditioned = self.decoder.kind in ("task", "generated")
        return self.decoder.adaptation(self.embed(hidden, mask, task_ids) if conditioned else None)

    def embed(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        if self.decoder.kind == "generated":
            return self.decoder.embedding(hidden, mask)
        if self.decoder.kind == "task":
            return self.decoder.task_vector(task_ids)
        return masked_mean(hidden, mask)

    def parts(self) -> dict[str, int]:
        return {
            f"{name}.{part}": sum(p.numel() for p in module.parameters())
            for name in ("encoder", "decoder")
            for part, module in getattr(self, name).named_children()
        }


class FixedSides(SidesMethod):
    """A cell of the grid under a name of its own: the kinds of both sides are given by the method."""

    kind: str

    def __init__(self, config: HyperdecoderConfig, base: nn.Module) -> None:
        config.method.encoder.adapter = config.method.decoder.adapter = self.kind
        super().__init__(config, base)


class AdapterMethod(FixedSides):
    """The adapter baseline (A.1): learned adapters in both stacks."""

    kind = "manual"


class TaskHypernet(FixedSides):
    """The task hypernet baseline (A.2): a hypernetwork for each stack, conditioned on a learned task embedding."""

    kind = "task"
