"""Watch the products with a base's weights, which its layers compute by `F.linear` and not as modules."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Linears(TorchFunctionMode):
    """The products with weights of the base inside a `with`.

    Attributes:
        read: {address of an input: (name of the last linear that reads it, the input)}. The tensor is held so that no
            other one gets its address.
        outputs: {name of a linear: its last output}.
    """

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.names = {
            module.weight.data_ptr(): name
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self.read: dict[int, tuple[str, Tensor]] = {}
        self.outputs: dict[str, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is F.linear:
            x, weight = args[:2]
            name = self.names.get(weight.data_ptr())
            if name is not None:
                self.read[x.untyped_storage().data_ptr()] = name, x
                self.outputs[name] = output
        return output
