"""Generated prefixes: vectors in front of the keys and values of the self-attention (Li and Liang 2021).

Keys and values start near 0, so at first a prefix takes some attention from the tokens and adds nothing: unlike with
adapters and LoRA, the untrained model differs from the base.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from hdscale.bases.interface import Adaptation

INIT_GAIN = 1e-3


class GeneratedPrefix(nn.Module):
    """Heads that turn a code into one layer's keys and values.

    Args:
        heads: H.
        d_kv: size of a head.
        length: P.
        bottleneck: K of the code.
    """

    def __init__(self, heads: int, d_kv: int, length: int, bottleneck: int) -> None:
        super().__init__()
        self.shape = (length, heads, d_kv)
        self.key = nn.Linear(bottleneck, length * heads * d_kv)
        self.value = nn.Linear(bottleneck, length * heads * d_kv)
        for linear in (self.key, self.value):
            bound = INIT_GAIN * math.sqrt(3.0 / bottleneck)
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """code [B, K] -> keys and values [B, H, P, d_kv]."""
        key, value = (linear(code).unflatten(-1, self.shape).transpose(1, 2) for linear in (self.key, self.value))
        return key, value


class GeneratedPrefixAdaptation(Adaptation):
    """Prefixes generated from codes [N, B, K] by heads that the layers share."""

    adapts_attention = True

    def __init__(self, prefix_heads: GeneratedPrefix, codes: Tensor) -> None:
        self.prefix_heads, self.codes = prefix_heads, codes

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.prefix_heads(self.codes[layer])

    def for_generation(self) -> CachedPrefixAdaptation:
        return CachedPrefixAdaptation([self.prefix(layer) for layer in range(len(self.codes))])


class CachedPrefixAdaptation(Adaptation):
    """Prefixes generated once: for each layer keys and values [B, H, P, d_kv]."""

    adapts_attention = True

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.layers[layer]

    def select(self, rows: Tensor) -> CachedPrefixAdaptation:
        layers = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in self.layers]
        return CachedPrefixAdaptation(layers)
