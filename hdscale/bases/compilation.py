"""`torch.compile` of the parts of a block: attention, feed-forward and norms, each compiled once for all layers.

The stacks are not compiled as a whole: every layer and every pair of lengths would need its own graph, at up to a
minute each. The parts compiled here are shared by the layers of a stack and accept any lengths, so a run has about ten
graphs, and the hooks of an adaptation run between them. CUDA graphs cannot be used, because the lengths change with
every pass.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MOST_GRAPHS = 32
"""Graphs of one function before torch stops compiling it: with and without mask or gradient, with one row or many."""


def compile_stacks(base: nn.Module) -> None:
    """Compile the sub-layers of a T5-family model's blocks for training, in place, when they are first used.

    Evaluation and decoding are not compiled.

    Args:
        base: with adapted blocks (see `adapt_blocks`).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for module in compiled_modules(base):
        module.forward = types.MethodType(training_forward(type(module).forward), module)


def decompile_stacks(base: nn.Module) -> None:
    """Undo `compile_stacks`."""
    for module in compiled_modules(base):
        module.__dict__.pop("forward", None)


def compiled_modules(base: nn.Module) -> Iterator[nn.Module]:
    """The modules of each block that are compiled."""
    for name in ("encoder", "decoder"):
        stack: Any = base.get_submodule(name)
        for block in stack.block:
            first, last = block.layer[0], block.layer[-1]
            yield from (first.layer_norm, first.SelfAttention, last.layer_norm, last.DenseReluDense)
            if block.is_decoder:
                yield block.layer[1]


@functools.cache
def training_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is compiled if gradients are needed; the same for all modules of a class."""
    compiled = torch.compile(forward, dynamic=True)

    @functools.wraps(forward)
    def choose(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # a method's hooks inside the attention are Python objects, one per layer, and each would need a graph of its
        # own; a packed attention is compiled already
        if module.training and torch.is_grad_enabled() and not kwargs.keys() & {"adaptation", "packing"}:
            return compiled(module, *args, **kwargs)
        return forward(module, *args, **kwargs)

    return choose
