"""Low-rank updates (Hu et al. 2022) of the linears of a base's attentions, learned or generated."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hdscale.bases.interface import Adaptation, StackSizes
from hdscale.errors import UserError, nearest
from hdscale.modeling.settings import LoraSettings
from hdscale.ops import group_by_instance

LINEARS = "qkvo"
ATTENTIONS = ("self", "cross", "all")


class AdaptedLinear(NamedTuple):
    """An adapted linear of every layer of a stack: its key and its sizes."""

    key: str
    d_in: int
    d_out: int


def check_lora(lora: LoraSettings) -> None:
    """Raise UserError for invalid values of `method.lora`."""
    if lora.rank < 1:
        raise UserError(f"method.lora.rank={lora.rank} must be at least 1")
    targets = lora.targets
    if targets is not None and (not targets or set(targets) - set(LINEARS) or len(set(targets)) < len(targets)):
        raise UserError(f"method.lora.targets={targets}: write letters among q, k, v and o, each once, such as qv")
    if lora.attention is not None and lora.attention not in ATTENTIONS:
        raise UserError(f"method.lora.attention={lora.attention}{nearest(lora.attention, ATTENTIONS)}")


def adapted_linears(sizes: StackSizes, targets: str, attention: str) -> list[AdaptedLinear]:
    """The linears of one layer that are adapted.

    Args:
        sizes: of the stack.
        targets: letters among q, k, v and o.
        attention: self, cross or all.
    """
    attentions = ("self", "cross") if sizes.is_decoder else ("self",)
    keys = [linear_key(kind, name) for kind in attentions if attention in (kind, "all") for name in targets]
    return [AdaptedLinear(key, *sizes.linears[key]) for key in keys]


def linear_key(attention: str, name: str) -> str:
    """The name of a linear within a layer: "self_q", "cross_o"."""
    return f"{attention}_{name}"


def apply_low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Each instance's own update, applied to its tokens: x [N, in], down [B, in, r], up [B, r, out] -> [N, out]."""
    grouped = group_by_instance(x, down.shape[0])
    return (grouped @ down @ up).reshape(*x.shape[:-1], up.shape[-1])


class LoraLinear(nn.Module):
    """`x A B * scale`, the update of one linear; [.., in] -> [.., out]. B starts at 0."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(d_in, rank))
        self.up = nn.Parameter(torch.zeros(rank, d_out))
        bound = 1.0 / math.sqrt(d_in)
        nn.init.uniform_(self.down, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down @ self.up * self.scale


class LoraAdaptation(Adaptation):
    """Learned low-rank updates.

    Args:
        layers: for each layer a ModuleDict of the updates by key.
    """

    adapts_attention = True

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers

    def projection(self, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        key, updates = linear_key(attention, name), cast(nn.ModuleDict, self.layers[layer])
        return y + updates[key](x) if key in updates else y

    def select(self, rows: Tensor) -> LoraAdaptation:
        return self  # the same for every instance


class GeneratedLora(nn.Module):
    """Heads that turn a code into one linear's update: [A | B] = W code + c; B starts at 0.

    Args:
        d_in, d_out: of the linear. rank: of the update. bottleneck: K of the code. scale: of the update.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, bottleneck: int, scale: float) -> None:
        super().__init__()
        self.d_in, self.d_out, self.rank, self.scale = d_in, d_out, rank, scale
        self.down = nn.Linear(bottleneck, d_in * rank)
        self.up = nn.Linear(bottleneck, rank * d_out)
        # hyper-fan-in (Chang et al. 2020) for A; B starts at 0
        bound = math.sqrt(3.0 / (bottleneck * d_in))
        nn.init.uniform_(self.down.weight, -bound, bound)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def generate(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """code [B, K] -> A [B, in, r] and B [B, r, out]; B includes the scale."""
        down = self.down(code).unflatten(-1, (self.d_in, self.rank))
        return down, self.up(code).unflatten(-1, (self.rank, self.d_out)) * self.scale

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """x [N, in], code [B, K] -> [N, out]."""
        return apply_low_rank(x, *self.generate(code))


class GeneratedLoraAdaptation(Adaptation):
    """Low-rank updates generated from codes [N, B, K] by heads (by key) that the layers share."""

    adapts_attention = True

    def __init__(self, heads: nn.ModuleDict, codes: Tensor) -> None:
        self.heads, self.codes = heads, codes

    def projection(self, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        key = linear_key(attention, name)
        return y + self.heads[key](x, self.codes[layer]) if key in self.heads else y

    def for_generation(self) -> CachedLoraAdaptation:
        return CachedLoraAdaptation(
            [{key: cast(GeneratedLora, head).generate(code) for key, head in self.heads.items()} for code in self.codes]
        )


class CachedLoraAdaptation(Adaptation):
    """Low-rank updates, one per instance, generated once: for each layer {key: (A [B, in, r], B [B, r, out])}."""

    adapts_attention = True

    def __init__(self, layers: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
        self.layers = layers

    def projection(self, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        update = self.layers[layer].get(linear_key(attention, name))
        return y if update is None else y + apply_low_rank(x, *update)

    def select(self, rows: Tensor) -> CachedLoraAdaptation:
        return CachedLoraAdaptation(
            [
                {key: (down.index_select(0, rows), up.index_select(0, rows)) for key, (down, up) in layer.items()}
                for layer in self.layers
            ]
        )
