"""Prefixes: vectors that stand before the keys and values of the self-attention (Li and Liang 2021), generated.

Keys start near 0, so at first a prefix takes some attention from the tokens and gives nothing for it: unlike adapters
and LoRA, a new prefix does not leave the base as it was.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from hdscale.bases.interface import Adaptation

INIT_GAIN = 1e-3


class GeneratedPrefix(nn.Module):
    """Heads that turn a code into one layer's keys and values.

    Args:
        heads: H. d_kv: size of a head. length: P. bottleneck: K of the code.
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
        return tuple(linear(code).unflatten(-1, self.shape).transpose(1, 2) for linear in (self.key, self.value))


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
    """Prefixes made once: for each layer keys and values [B, H, P, d_kv]."""

    adapts_attention = True

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.layers[layer]

    def select(self, rows: Tensor) -> CachedPrefixAdaptation:
        return CachedPrefixAdaptation([tuple(part.index_select(0, rows) for part in layer) for layer in self.layers])
