"""The hypernetwork: Eq. 3-7 and 9, shared over the layers of a stack by learned layer embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hdscale.bases.interface import Adaptation
from hdscale.ops import (
    AdapterHeads,
    AdapterWeights,
    SharedHeads,
    apply_adapter,
    generate_adapter_weights,
    generated_adapter,
    group_by_instance,
    share_heads,
)

INIT_GAIN = 1e-3
"""Scale of the heads' initialisation in the release."""


class GeneratedAdapterHeads(nn.Module):
    """The four linear heads of Eq. 4-7, which turn a code into one adapter and apply it.

    They are a module whose forward uses its own parameters, so that DeepSpeed's stage 3 can gather them.

    Args:
        d_model: D.
        dim: adapter size A.
        bottleneck: size K of the code.
        backend: see `hdscale.ops`.
    """

    def __init__(self, d_model: int, dim: int, bottleneck: int, backend: str = "auto") -> None:
        super().__init__()
        self.d_model, self.dim, self.bottleneck, self.backend = d_model, dim, bottleneck, backend
        self.down_weight = nn.Parameter(torch.empty(d_model * dim, bottleneck))
        self.down_bias = nn.Parameter(torch.zeros(d_model * dim))
        self.up_weight = nn.Parameter(torch.empty(dim * d_model, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(dim * d_model))
        self.down_bias_weight = nn.Parameter(torch.empty(dim, bottleneck))
        self.down_bias_bias = nn.Parameter(torch.zeros(dim))
        self.up_bias_weight = nn.Parameter(torch.empty(d_model, bottleneck))
        self.up_bias_bias = nn.Parameter(torch.zeros(d_model))
        # hyper-fan-in (Chang et al. 2020): preserves the variance of the generated layer's output, not of the head's
        for weight, fan in (
            (self.up_weight, dim),
            (self.down_weight, d_model),
            (self.up_bias_weight, 1),
            (self.down_bias_weight, 1),
        ):
            bound = INIT_GAIN * math.sqrt(3.0 / (bottleneck * fan))
            nn.init.uniform_(weight, -bound, bound)

    def heads(self) -> AdapterHeads:
        """The parameters in the form that the operator takes."""
        return AdapterHeads(
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            self.down_bias_weight,
            self.down_bias_bias,
            self.up_bias_weight,
            self.up_bias_bias,
        )

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """x [B, T, D], code [B, K] -> [B, T, D]: each instance's adapter, applied to its own rows (Eq. 1)."""
        return generated_adapter(x, code, self.heads(), backend=self.backend)

    def generate(self, code: Tensor) -> AdapterWeights:
        """code [B, K] -> each instance's adapter, for use by `apply_adapter`."""
        return generate_adapter_weights(code, self.heads())


class Hypernetwork(nn.Module):
    """`Adapter_i = Hypernetwork([e; l_i])` (Eq. 9); its first layer (Eq. 3) is computed for all layers i at once.

    Args:
        d_input: size of e.
        layers: N.
        bottleneck: K.
        layer_embedding: size of l_i; 0 for no layer embeddings, so that the layers share one code.
        heads: modules that turn a code into an adaptation, by name (`adapter_heads`: Eq. 4-7).
    """

    def __init__(
        self, d_input: int, layers: int, bottleneck: int, layer_embedding: int, heads: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        self.layers = layers
        self.layer_embedding = nn.Embedding(layers, layer_embedding) if layer_embedding else None
        self.linear = nn.Linear(d_input + layer_embedding, bottleneck)
        for name, module in heads.items():
            self.add_module(name, module)

    def forward(self, e: Tensor) -> Tensor:
        """e [B, d_input] -> codes [N, B, K] (Eq. 3)."""
        both = e.unsqueeze(0).expand(self.layers, -1, -1)
        if self.layer_embedding is not None:
            layers = self.layer_embedding.weight  # [N, L]
            both = torch.cat([both, layers.unsqueeze(1).expand(-1, e.shape[0], -1)], dim=-1)
        return torch.relu(self.linear(both))


class GeneratedAdaptation(Adaptation):
    """Adapters generated from codes, in parallel with the feed-forward sub-layers.

    Args:
        adapter_heads: turn a code into an adapter.
        codes: [N, B, K].
        normed_input: the adapters read LayerNorm(x) instead of x (Table 9).
    """

    def __init__(self, adapter_heads: GeneratedAdapterHeads, codes: Tensor, normed_input: bool = False) -> None:
        self.adapter_heads = adapter_heads
        self.codes = codes
        self.normed_input = normed_input

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor:
        grouped = group_by_instance(normed if self.normed_input else x, self.codes.shape[1])
        return self.adapter_heads(grouped, self.codes[layer]).view(x.shape)

    def for_training(self, length: int) -> Adaptation:
        heads = self.adapter_heads
        if hasattr(heads.down_weight, "ds_id"):
            return self  # DeepSpeed's stage 3 gathers the parameters only within the heads' own forward
        layers = share_heads(self.codes, heads.heads(), length, backend=heads.backend)
        return SharedAdaptation(layers, heads.backend, self.normed_input)

    def for_generation(self) -> CachedAdaptation:
        # all layers in one product, which reads the heads' weights once instead of once per layer
        together = self.adapter_heads.generate(self.codes.flatten(0, 1))
        layers = zip(*(tensor.chunk(len(self.codes)) for tensor in together), strict=True)
        return CachedAdaptation([AdapterWeights(*layer) for layer in layers], self.normed_input)


class SharedAdaptation(Adaptation):
    """Generated adapters of one pass; their heads' gradient is computed once for all layers (`ops.share_heads`).

    Args:
        layers: code and heads of each layer.
        backend: see `hdscale.ops`.
        normed_input: as in `GeneratedAdaptation`.
    """

    def __init__(
        self, layers: list[tuple[Tensor, AdapterHeads | SharedHeads]], backend: str, normed_input: bool
    ) -> None:
        self.layers = layers
        self.backend = backend
        self.normed_input = normed_input

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor:
        code, heads = self.layers[layer]
        grouped = group_by_instance(normed if self.normed_input else x, code.shape[0])
        return generated_adapter(grouped, code, heads, backend=self.backend).view(x.shape)


class CachedAdaptation(Adaptation):
    """Adapters generated once per instance and applied to every decoded token; the beams of an instance share them.

    Args:
        weights: one entry per layer, each for B instances.
        normed_input: as in `GeneratedAdaptation`.
    """

    def __init__(self, weights: list[AdapterWeights], normed_input: bool = False) -> None:
        self.weights = weights
        self.normed_input = normed_input

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor:
        return apply_adapter(normed if self.normed_input else x, self.weights[layer])

    def select(self, rows: Tensor) -> CachedAdaptation:
        layers = [AdapterWeights(*(tensor.index_select(0, rows) for tensor in layer)) for layer in self.weights]
        return CachedAdaptation(layers, self.normed_input)
