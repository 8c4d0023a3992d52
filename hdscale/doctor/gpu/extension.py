"""The CUDA extension: built for the cards of this machine, loaded, registered, and right at its first use."""

from __future__ import annotations

from pathlib import Path

import torch

from hdscale.doctor.backends import unregistered
from hdscale.doctor.gpu.lines import Lines, NotPossible, Wrong
from hdscale.ops.architectures import OLDEST
from hdscale.ops.backend import availability
from hdscale.ops.build import BuildError, build_kernels, load_kernels


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `extension`."""
    with lines.check("built for these cards") as found:
        check_cards()
        try:
            build = build_kernels("cuda")
        except BuildError as error:
            raise Wrong(str(error)) from error
        found.say(
            f"for {' '.join(build.architectures)} in {build.seconds:.0f} s by {build.compiler}",
            seconds=build.seconds,
            folder=str(build.folder),
        )
    with lines.check("loads") as found:
        check_cards()
        try:
            found.say(load_kernels("cuda").description)
        except BuildError as error:
            raise Wrong(str(error)) from error
    with lines.check("kernels are registered"):
        check_cards()
        if missing := unregistered():
            raise Wrong(f"no CUDA kernel for {', '.join(missing)}")
    for index in range(torch.cuda.device_count()):
        with lines.check(f"right at first use on GPU {index}") as found:
            check_cards()
            state = availability("cuda", torch.device("cuda", index))
            if not state.usable:
                raise Wrong(state.reason)
            found.say(state.reason)


def check_cards() -> None:
    """Raise NotPossible on a machine whose cards have no compiled kernels."""
    if torch.version.hip:
        raise NotPossible("this torch is built for ROCm, and the kernels for CUDA")
    if min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())) < OLDEST:
        raise NotPossible("the kernels need compute capability 8.0 (A100) or later")


def need_kernels() -> None:
    """Raise NotPossible if the compiled kernels cannot be used on the current card."""
    check_cards()
    state = availability("cuda")
    if not state.usable:
        raise NotPossible("the compiled kernels cannot be used: see the stage extension")
