"""`method.budget`: the size with which a method trains a given share of the base, to compare methods at equal cost."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch

from hdscale.bases.loading import load_base
from hdscale.bases.settings import ModelSettings
from hdscale.errors import UserError, nearest
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.methods.interface import Method
from hdscale.modeling.methods.options import set_option

LARGEST = 1 << 20
"""Largest size that is tried."""


def parse_budget(text: str) -> tuple[float, float]:
    """The share of "2.9%" in percent, and the tolerance within which it is met: half a unit of its last digit.

    Raises:
        UserError: for text of another form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.(\d+))?)\s*%\s*", text)
    if match is None or not 0.0 < float(match[1]) <= 100.0:
        raise UserError(f"method.budget={text}: write a share of the base's parameters in percent, such as 2.9%")
    return float(match[1]), 0.5 * 10.0 ** -len(match[2] or "")


class Counter:
    """Counts the trainable parameters of a method for any sizes, with a base on the meta device.

    Args:
        cls: the method.
        config: base, method and tasks.
    """

    def __init__(self, cls: type[Method], config: HyperdecoderConfig) -> None:
        self.cls, self.config = cls, config
        self.base = load_base(ModelSettings(config.model.name, config.model.revision), torch.float32, "meta")
        self.total = sum(parameter.numel() for parameter in self.base.parameters())

    def percent(self, keys: list[str], size: int) -> float:
        """The trainable share in percent with the options `keys` set to `size`."""
        config = copy.deepcopy(self.config)
        for key in keys:
            set_option(config.method, key, size)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            method = self.cls(config, self.base)
        trained = sum(parameter.numel() for parameter in method.parameters())
        trained += sum(self.base.get_parameter(name).numel() for name in method.base_trainables(self.base))
        return 100.0 * trained / self.total


def solve_budget(cls: type[Method], config: HyperdecoderConfig) -> None:
    """Set one size of the method so that it trains `method.budget` of the base, and clear the budget.

    Args:
        cls: the method.
        config: changed in place, so that an export contains the size itself.

    Raises:
        UserError: for a share that no size gives, with the nearest that one does; for a method without such a size.
    """
    method = config.method
    if method.budget is None:
        if method.solve is not None:
            raise UserError(f"method.solve={method.solve} needs a method.budget, such as 2.9%")
        return
    wanted, tolerance = parse_budget(method.budget)
    choices = cls.sizes(method)
    if not choices:
        raise UserError(f"method.budget={method.budget}: method '{method.name}' has no size to solve for; leave it out")
    keys = choices[0]
    if method.solve is not None:
        known = [key for choice in choices for key in choice]
        if method.solve not in known:
            raise UserError(
                f"method.solve={method.solve}: not a size of method '{method.name}'{nearest(method.solve, known)}"
            )
        keys = [method.solve]
    counter = Counter(cls, config)
    size = nearest_size(lambda size: counter.percent(keys, size), wanted)
    found = counter.percent(keys, size)
    if abs(found - wanted) > tolerance:
        names = " = ".join(f"method.{key}" for key in keys)
        raise UserError(
            f"method.budget={method.budget} cannot be met by {names}: the nearest is {size} with {found:.3f}%; "
            f"write method.budget={found:.3f}%, change another size, or choose the size to solve for with method.solve"
        )
    for key in keys:
        set_option(method, key, size)
    method.budget = method.solve = None


def nearest_size(percent: Callable[[int], float], wanted: float) -> int:
    """The size, at least 1, whose share is nearest to `wanted`; the share grows with the size."""
    low, high = 1, 2
    if percent(low) >= wanted:
        return low
    while percent(high) < wanted:
        low, high = high, high * 2
        if high > LARGEST:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if percent(middle) < wanted else (low, middle)
    return min((low, high), key=lambda size: abs(percent(size) - wanted))
