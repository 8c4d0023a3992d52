"""A T5 written out in float64, one instance at a time, without padding, caches or batches.

What the package computes is compared with this: nothing of transformers or of the package is used but the weights.
Shapes: S source, T target, D d_model, H heads, P prefix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Hooks:
    """What a method adds; by default nothing. `side` is "encoder" or "decoder"."""

    def linear(self, side: str, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        return y

    def prefix(self, side: str, layer: int) -> tuple[Tensor, Tensor] | None:
        return None  # keys and values [P, H * d_kv]

    def after_attention(self, side: str, layer: int, y: Tensor) -> Tensor:
        return y

    def after_feed_forward(self, side: str, layer: int, y: Tensor) -> Tensor:
        return y

    def parallel(self, side: str, layer: int, x: Tensor, normed: Tensor) -> Tensor | float:
        return 0.0


def bucket(distance: int, bidirectional: bool, buckets: int, largest: int) -> int:
    """Raffel et al. 2020: half of the buckets exact, the rest logarithmic; `distance` is key minus query."""
    found = 0
    if bidirectional:
        buckets //= 2
        if distance > 0:
            found = buckets
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return found + distance
    far = exact + int(math.log(distance / exact) / math.log(largest / exact) * (buckets - exact))
    return found + min(far, buckets - 1)


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class DirectT5:
    """Weights of a T5 by name, and its passes for one instance."""

    def __init__(self, base: torch.nn.Module) -> None:
        self.config = base.config
        self.weights = {name: value.detach().double() for name, value in base.state_dict().items()}

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_epsilon).sqrt() * self.weights[name]

    def attention(self, side: str, layer: int, kind: str, x: Tensor, source: Tensor, hooks: Hooks) -> Tensor:
        sub, module = {"self": (0, "SelfAttention"), "cross": (1, "EncDecAttention")}[kind]
        stem = f"{side}.block.{layer}.layer.{sub}.{module}"

        def linear(name: str, x: Tensor) -> Tensor:
            return hooks.linear(side, layer, kind, name, x, x @ self.weights[f"{stem}.{name}.weight"].T)

        query, key, value = linear("q", x), linear("k", source), linear("v", source)
        prefix = hooks.prefix(side, layer) if kind == "self" else None
        length = 0
        if prefix is not None:
            length = prefix[0].shape[0]
            key, value = torch.cat([prefix[0], key]), torch.cat([prefix[1], value])
        heads, size = self.config.num_heads, self.config.d_kv
        mixed = torch.zeros_like(query)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            score = query[:, part] @ key[:, part].T
            if kind == "self":
                # UMT5 has biases in every layer, the others in the first
                own = layer if self.config.model_type == "umt5" else 0
                table = self.weights[f"{side}.block.{own}.layer.0.SelfAttention.relative_attention_bias.weight"]
                for i in range(query.shape[0]):
                    for j in range(source.shape[0]):
                        where = bucket(
                            j - i,
                            side == "encoder",
                            self.config.relative_attention_num_buckets,
                            self.config.relative_attention_max_distance,
                        )
                        score[i, length + j] += table[where, head]
                        if side == "decoder" and j > i:
                            score[i, length + j] = -math.inf
            mixed[:, part] = torch.softmax(score, dim=-1) @ value[:, part]
        return linear("o", mixed)

    def feed_forward(self, side: str, layer: int, sub: int, x: Tensor) -> Tensor:
        stem = f"{side}.block.{layer}.layer.{sub}.DenseReluDense"
        if self.config.is_gated_act:
            hidden = gelu_new(x @ self.weights[f"{stem}.wi_0.weight"].T) * (x @ self.weights[f"{stem}.wi_1.weight"].T)
        else:
            hidden = torch.relu(x @ self.weights[f"{stem}.wi.weight"].T)
        return hidden @ self.weights[f"{stem}.wo.weight"].T

    def stack(self, side: str, ids: Tensor, source: Tensor | None, hooks: Hooks) -> Tensor:
        x = self.weights["shared.weight"][ids]
        layers = self.config.num_layers if side == "encoder" else self.config.num_decoder_layers
        for layer in range(layers):
            stem = f"{side}.block.{layer}.layer"
            normed = self.norm(f"{stem}.0.layer_norm.weight", x)
            x = x + hooks.after_attention(side, layer, self.attention(side, layer, "self", normed, normed, hooks))
            if side == "decoder":
                normed = self.norm(f"{stem}.1.layer_norm.weight", x)
                x = x + self.attention(side, layer, "cross", normed, source, hooks)
            sub = 1 if side == "encoder" else 2
            normed = self.norm(f"{stem}.{sub}.layer_norm.weight", x)
            y = hooks.after_feed_forward(side, layer, self.feed_forward(side, layer, sub, normed))
            x = x + y + hooks.parallel(side, layer, x, normed)
        return self.norm(f"{side}.final_layer_norm.weight", x)

    def encode(self, ids: Tensor, hooks: Hooks) -> Tensor:
        """ids [S] -> h [S, D]."""
        return self.stack("encoder", ids, None, hooks)

    def logits(self, h: Tensor, labels: Tensor, hooks: Hooks) -> Tensor:
        """h [S, D], labels [T] -> teacher-forced logits [T, V]."""
        ids = torch.cat([torch.tensor([self.config.decoder_start_token_id]), labels[:-1]])
        hidden = self.stack("decoder", ids, h, hooks)
        if getattr(self.config, "scale_decoder_outputs", False):
            hidden = hidden * self.config.d_model**-0.5
        return hidden @ self.weights["lm_head.weight"].T
