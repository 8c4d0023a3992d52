"""`train.deterministic`: the same bits from the same GPUs, at the cost of faster kernels that add in any order."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from hdscale.errors import UserError

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""The two values with which cuBLAS gives the same bits whatever streams run beside it; the first is the faster one."""
NOT_DETERMINISTIC = re.compile(r"(.+?) does not have a deterministic implementation")


def prepare_determinism(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let torch use deterministic algorithms only: to be called before anything is computed on a GPU.

    cuBLAS reads its variable when it is first used. What torch does without a deterministic algorithm raises from now
    on. Memory that is not yet written stays as it is: torch would fill it, which costs a kernel for each tensor.

    Raises:
        UserError: if the environment sets workspaces of cuBLAS that give other bits from run to run.
    """
    workspace = environ.setdefault(WORKSPACE_VARIABLE, WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise UserError(
            f"{WORKSPACE_VARIABLE}={workspace} does not let cuBLAS be deterministic, and "
            f"train.deterministic=true asks for that; unset it, or set it to {WORKSPACES[0]}"
        )
    torch.use_deterministic_algorithms(True)
    # an attribute that torch answers through the module's class, which its types leave out
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def faster_algorithms() -> Iterator[None]:
    """Torch's default algorithms, for as long as it takes to measure what the deterministic ones cost."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def cost_of_determinism(seconds_of_pass: Callable[[], float]) -> str:
    """One line of the log: the time of a pass with and without deterministic algorithms.

    Args:
        seconds_of_pass: times one forward and backward pass.
    """
    with faster_algorithms():
        faster = seconds_of_pass()
    ours = seconds_of_pass()
    return (
        f"train.deterministic: a forward and backward pass takes {ours:.3g} s instead of {faster:.3g} s "
        f"({ours / faster - 1:+.0%})"
    )


@contextmanager
def operators_are_named() -> Iterator[None]:
    """Raise UserError in place of torch's error about an operator that has no deterministic algorithm."""
    try:
        yield
    except RuntimeError as error:
        found = NOT_DETERMINISTIC.search(str(error))
        if not found:
            raise
        raise UserError(
            f"train.deterministic=true: {found[1]} has no deterministic algorithm on this device; use another torch, "
            "or train.deterministic=false with another run.name"
        ) from error
