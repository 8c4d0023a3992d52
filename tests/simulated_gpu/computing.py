"""Operators that only CUDA has, written with those that the host computes: attention, and the fused RMS norm.

Installed where numbers are wanted (`--compute`). Each takes the arguments of CUDA's own, and returns its shapes,
layouts and number types.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEPT: list[Any] = []
"""The registration, which ends with its object."""


def install() -> None:
    """Take the place of CUDA's kernels."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each kernel that is replaced
        for name, function in OPERATORS.items():
            library.impl(name, torch.no_grad()(function), "CUDA")
    KEPT.append(library)


def scores_of(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Scores of [B, H, L, d] and [B, H, S, d], in float32."""
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def kept(shape: torch.Size, dropout: float, seed: Tensor) -> Tensor:
    """What dropout multiplies with: the same for the same seed."""
    generator = torch.Generator().manual_seed(int(seed))
    return ((torch.rand(shape, generator=generator) >= dropout).float() / (1 - dropout)).to(seed.device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of [B, H, L, d]; the result as [B, L, H, d], the scores' logarithmic sums, and dropout's seed."""
    scores = scores_of(query, key, bias, causal, scale)
    weights = scores.softmax(-1)
    seed = torch.randint(1 << 62, ()).to(query.device)
    if dropout:
        weights = weights * kept(weights.shape, dropout, seed)
    mixed = (weights @ value.float()).to(query.dtype)
    return mixed.transpose(1, 2).contiguous(), scores.logsumexp(-1), seed


def gradients(  # noqa: PLR0913
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, seed: Tensor,
    dropout: float, causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key, value and bias, all as [B, H, L, d]."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weights = scores_of(query, key, bias, causal, scale).softmax(-1)
    drop = kept(weights.shape, dropout, seed) if dropout else torch.ones((), device=query.device)
    grad = grad.float()
    of_value = (weights * drop).mT @ grad
    of_weights = grad @ value.float().mT * drop
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_query, of_key = of_scores @ key.float() * factor, of_scores.mT @ query.float() * factor
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), of_scores


def summed_to(gradient: Tensor, bias: Tensor | None, wanted: bool) -> Tensor | None:
    """The gradient of a bias, which may have been broadcast."""
    return gradient.sum_to_size(bias.shape).to(bias.dtype) if wanted and bias is not None else None


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, logsumexp: bool, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """_scaled_dot_product_efficient_attention"""
    mixed, sums, seed = attend(query, key, value, bias, dropout, causal, scale)
    return mixed.transpose(1, 2), sums, seed, torch.zeros_like(seed)


def sdpa_backward(  # noqa: PLR0913
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, sums: Tensor,
    seed: Tensor, offset: Tensor, dropout: float, wanted: list[bool], causal: bool = False, *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """_scaled_dot_product_efficient_attention_backward"""
    *of_inputs, of_bias = gradients(grad, query, key, value, bias, seed, dropout, causal, scale)
    return *of_inputs, summed_to(of_bias, bias, wanted[3])


def flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False, *,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """_scaled_dot_product_flash_attention"""
    mixed, sums, seed = attend(query, key, value, None, dropout, causal, scale)
    return mixed.transpose(1, 2), sums, None, None, query.shape[2], key.shape[2], seed, torch.zeros_like(seed), None


def flash_backward(  # noqa: PLR0913
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, starts: Any, others: Any,
    longest: int, most: int, dropout: float, causal: bool, seed: Tensor, offset: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """_scaled_dot_product_flash_attention_backward"""
    return gradients(grad, query, key, value, None, seed, dropout, causal, scale)[:3]


def efficient(  # noqa: PLR0913
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, starts: Any, others: Any, longest: Any, most: Any,
    dropout: float, mask_type: int, logsumexp: bool = False, *, scale: float | None = None, **other: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """_efficient_attention_forward, of [B, L, H, d]"""
    sides = (side.transpose(1, 2) for side in (query, key, value))
    mixed, sums, seed = attend(*sides, bias, dropout, mask_type == 1, scale)
    return mixed, sums, seed, torch.zeros_like(seed), query.shape[1], key.shape[1]


def efficient_backward(  # noqa: PLR0913
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, starts: Any, others: Any,
    longest: Any, most: Any, sums: Tensor, dropout: float, seed: Tensor, offset: Tensor, mask_type: int,
    bias_wanted: bool, *, scale: float | None = None, shared_storage_dqdkdv: bool = False, **other: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """_efficient_attention_backward, of [B, L, H, d]; one tensor for the three gradients where that is asked for."""
    sides = [side.transpose(1, 2) for side in (grad, query, key, value)]
    *found, of_bias = gradients(*sides, bias, seed, dropout, mask_type == 1, scale)
    found = [one.transpose(1, 2) for one in found]
    if shared_storage_dqdkdv:
        found = list(torch.stack(found, dim=2).unbind(2))
    return *found, summed_to(of_bias, bias, bias_wanted)


def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """_fused_rms_norm, over the last dimension"""
    inverse = (x.float().square().mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    normed = x.float() * inverse
    return (normed if weight is None else normed * weight.float()).to(x.dtype), inverse


def rms_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], inverse: Tensor, weight: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """_fused_rms_norm_backward"""
    normed = x.float() * inverse
    scaled = grad.float() if weight is None else grad.float() * weight.float()
    of_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse
    of_weight = (grad.float() * normed).flatten(0, -2).sum(0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype) if wanted[1] and weight is not None else None


OPERATORS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_efficient_attention": sdpa,
    "_scaled_dot_product_efficient_attention_backward": sdpa_backward,
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_efficient_attention_forward": efficient,
    "_efficient_attention_backward": efficient_backward,
    "_fused_rms_norm": rms_norm,
    "_fused_rms_norm_backward": rms_norm_backward,
    # products of bf16 with results in float32
    "mm.dtype": lambda a, b, out: torch.mm(a.to(out), b.to(out)),
    "bmm.dtype": lambda a, b, out: torch.bmm(a.to(out), b.to(out)),
}
