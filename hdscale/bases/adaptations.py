"""Adaptations made of other adaptations: several at once, a different one for each layer, a scaled one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdscale.bases.interface import Adaptation


class ComposedAdaptation(Adaptation):
    """Several adaptations of one stack: branches are added, prefixes concatenated, the other hooks chained."""

    def __init__(self, members: Sequence[Adaptation]) -> None:
        self.members = list(members)
        self.adapts_attention = any(member.adapts_attention for member in self.members)
        self.adapts_outputs = any(member.adapts_outputs for member in self.members)

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for member in self.members:
            branch = member.parallel(layer, x, normed)
            if branch is not None:
                total = branch if total is None else total + branch
        return total

    def after_self_attention(self, layer: int, y: Tensor) -> Tensor:
        for member in self.members:
            y = member.after_self_attention(layer, y)
        return y

    def after_feed_forward(self, layer: int, y: Tensor) -> Tensor:
        for member in self.members:
            y = member.after_feed_forward(layer, y)
        return y

    def projection(self, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        for member in self.members:
            y = member.projection(layer, attention, name, x, y)
        return y

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        prefixes = [prefix for member in self.members if (prefix := member.prefix(layer)) is not None]
        if not prefixes:
            return None
        return torch.cat([keys for keys, _ in prefixes], dim=2), torch.cat([values for _, values in prefixes], dim=2)

    def for_generation(self) -> Adaptation:
        return ComposedAdaptation([member.for_generation() for member in self.members])

    def select(self, rows: Tensor) -> Adaptation | None:
        members = [selected for member in self.members if (selected := member.select(rows)) is not None]
        return ComposedAdaptation(members) if len(members) == len(self.members) else None

    def for_training(self, length: int) -> Adaptation:
        return ComposedAdaptation([member.for_training(length) for member in self.members])


class LayerwiseAdaptation(Adaptation):
    """A different adaptation for each layer.

    Args:
        layers: for each of the stack's layers its adaptation, and the layer's index within that adaptation.
    """

    def __init__(self, layers: Sequence[tuple[Adaptation, int]]) -> None:
        self.layers = list(layers)
        self.adapts_attention = any(member.adapts_attention for member, _ in self.layers)
        self.adapts_outputs = any(member.adapts_outputs for member, _ in self.layers)

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        member, index = self.layers[layer]
        return member.parallel(index, x, normed)

    def after_self_attention(self, layer: int, y: Tensor) -> Tensor:
        member, index = self.layers[layer]
        return member.after_self_attention(index, y)

    def after_feed_forward(self, layer: int, y: Tensor) -> Tensor:
        member, index = self.layers[layer]
        return member.after_feed_forward(index, y)

    def projection(self, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        member, index = self.layers[layer]
        return member.projection(index, attention, name, x, y)

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        member, index = self.layers[layer]
        return member.prefix(index)

    def for_generation(self) -> Adaptation:
        cached = {id(member): member.for_generation() for member, _ in self.layers}
        return LayerwiseAdaptation([(cached[id(member)], index) for member, index in self.layers])

    def select(self, rows: Tensor) -> Adaptation | None:
        selected: dict[int, Adaptation] = {}
        for member, _ in self.layers:
            if id(member) not in selected:
                part = member.select(rows)
                if part is None:
                    return None
                selected[id(member)] = part
        return LayerwiseAdaptation([(selected[id(member)], index) for member, index in self.layers])

    def for_training(self, length: int) -> Adaptation:
        prepared = {id(member): member.for_training(length) for member, _ in self.layers}
        return LayerwiseAdaptation([(prepared[id(member)], index) for member, index in self.layers])


class ScaledAdaptation(Adaptation):
    """An adaptation whose branch beside the feed-forward is multiplied by a factor.

    Args:
        inner: the adaptation.
        scale: one factor, or one per layer [N].
    """

    def __init__(self, inner: Adaptation, scale: float | Tensor) -> None:
        self.inner, self.scale = inner, scale
        self.adapts_attention, self.adapts_outputs = inner.adapts_attention, inner.adapts_outputs

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        branch = self.inner.parallel(layer, x, normed)
        if branch is None:
            return None
        return branch * (self.scale[layer] if isinstance(self.scale, Tensor) else self.scale)

    def after_self_attention(self, layer: int, y: Tensor) -> Tensor:
        return self.inner.after_self_attention(layer, y)

    def after_feed_forward(self, layer: int, y: Tensor) -> Tensor:
        return self.inner.after_feed_forward(layer, y)

    def projection(self, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.projection(layer, attention, name, x, y)

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return self.inner.prefix(layer)

    def for_generation(self) -> Adaptation:
        return ScaledAdaptation(self.inner.for_generation(), self.scale)

    def select(self, rows: Tensor) -> Adaptation | None:
        inner = self.inner.select(rows)
        return None if inner is None else ScaledAdaptation(inner, self.scale)

    def for_training(self, length: int) -> Adaptation:
        return ScaledAdaptation(self.inner.for_training(length), self.scale)
