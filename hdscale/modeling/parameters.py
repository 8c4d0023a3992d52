"""Counting a model's parameters by part, without memory for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.model import AdaptedModel, build_model


@dataclass
class ParameterCount:
    """Numbers of parameters of an adapted model.

    Attributes:
        model: name of the base.
        method: name of the method.
        base: of the base alone, which is what full fine-tuning trains (tied weights are counted once).
        trainable: what the method trains.
        percent: 100 * trainable / base, as in the paper's tables.
        parts: trainable parameters by part of the method.
        base_parts: the base's parameters by part.
    """

    model: str
    method: str
    base: int
    trainable: int
    percent: float
    parts: dict[str, int]
    base_parts: dict[str, int]


def count_parameters(model: AdaptedModel) -> ParameterCount:
    """Count the parameters of a model on any device, meta included."""
    base = sum(parameter.numel() for parameter in model.base.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parts = model.method.parts()
    rest = trainable - sum(parts.values())
    if rest:
        parts["base"] = rest
    seen: set[int] = set()
    base_parts = {}
    for name in model.base.part_names:
        own = [p for p in model.base.get_submodule(name).parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        base_parts["embeddings" if name == "shared" else name] = sum(p.numel() for p in own)
    return ParameterCount(
        model=model.config.model.name,
        method=model.config.method.name,
        base=base,
        trainable=trainable,
        percent=100.0 * trainable / base,
        parts=parts,
        base_parts=base_parts,
    )


def count_for(config: HyperdecoderConfig) -> ParameterCount:
    """Count the parameters of a configuration in seconds at any size, without memory or weights."""
    return count_parameters(build_model(config, dtype=torch.float32, device="meta"))
