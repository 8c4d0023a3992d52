"""What evaluation needs of a group of ranks; `hdscale.engine.ranks.Ranks` has it, and so has one
process alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Value = TypeVar("Value")


class RankGroup(Protocol):
    """Rank and size of a group, and its collectives."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Wait for every rank."""

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""

    def on_main(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """Call `function` on rank 0; its result, or its exception, reaches every rank."""


class SingleProcess:
    """A group of one: every collective returns at once."""

    rank = 0
    world_size = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def all_true(self, flag: bool) -> bool:
        return bool(flag)

    def on_main(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        return function(*args, **kwargs)
