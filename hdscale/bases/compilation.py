"""`torch.compile` of what a block computes: attention, feed-forward and norms, each compiled once for all layers.

The stacks are not compiled whole: every layer and every pair of lengths would be a graph of its own, at up to a minute each.
What is compiled here is shared by the layers of a stack and takes any lengths, so a run has some ten graphs, and the hooks of
an adaptation run between them. Lengths change from pass to pass, which is why CUDA graphs do not hold here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MOST_GRAPHS = 32
"""Of one function, before torch stops to compile it: with and without a mask, with and without a gradient, one row or many."""


def compile_stacks(base: nn.Module) -> None:
    """Compile the sub-layers of a T5-family model's blocks for training, in place. The compiler runs at their first use.

    Evaluation and decoding are left as they are.

    Args:
        base: its blocks adapted (`adapt_blocks`).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for module in compiled_modules(base):
        module.forward = types.MethodType(training_forward(type(module).forward), module)


def decompile_stacks(base: nn.Module) -> None:
    """Undo `compile_stacks`."""
    for module in compiled_modules(base):
        module.__dict__.pop("forward", None)


def compiled_modules(base: nn.Module) -> Iterator[nn.Module]:
    """What is compiled of each block."""
    for stack in (base.encoder, base.decoder):
        for block in stack.block:
            first, last = block.layer[0], block.layer[-1]
            yield from (first.layer_norm, first.SelfAttention, last.layer_norm, last.DenseReluDense)
            if block.is_decoder:
                yield block.layer[1]


@functools.cache
def training_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is compiled while gradients are taken; one for all modules of a class."""
    compiled = torch.compile(forward, dynamic=True)

    @functools.wraps(forward)
    def choose(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # a method's hooks inside the attention are Python objects, one a layer: each would be a graph; a packed attention is compiled
        if module.training and torch.is_grad_enabled() and not kwargs.keys() & {"adaptation", "packing"}:
            return compiled(module, *args, **kwargs)
        return forward(module, *args, **kwargs)

    return choose
