"""The group of ranks that share a piece of work, and a group of one.

`hdscale.engine.ranks.Ranks` is such a group too. This file imports no torch, so that light code can name the type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Value = TypeVar("Value")


class RankGroup(Protocol):
    """Rank and size of a group, and its collectives: every rank must call each of them, in the same order."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Wait for every rank."""

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""

    def broadcast_object(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""

    def on_main(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """Call `function` on rank 0; its result, or its exception, reaches every rank."""

    def close(self) -> None:
        """Leave the group, at the end of the process."""


class SingleProcess:
    """A group of one rank."""

    rank = 0
    world_size = 1

    def barrier(self) -> None:
        """There is no other rank to wait for."""

    def all_true(self, flag: bool) -> bool:
        return bool(flag)

    def broadcast_object(self, value: Value) -> Value:
        return value

    def on_main(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        return function(*args, **kwargs)

    def close(self) -> None:
        """There is no group to leave."""
