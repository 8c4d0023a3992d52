"""CUDA architectures: those that the kernels are built for, and whether a build runs on a GPU."""

from __future__ import annotations

import os
import re

import torch

from hdscale.errors import nearest

OLDEST = (8, 0)
"""The kernels need an A100 or a later GPU."""
DEFAULT = "8.0 9.0"
"""Built for where no GPU is visible and nothing is asked for."""
NAMED = {
    "kepler": "3.7",
    "maxwell": "5.2",
    "pascal": "6.1",
    "volta": "7.0",
    "turing": "7.5",
    "ampere": "8.0 8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 12.0+PTX",
}
"""Names that torch allows in $TORCH_CUDA_ARCH_LIST. A suffix such as in `Ampere+Tegra` is ignored."""

Capability = tuple[int, int]


class ArchitectureError(ValueError):
    """$TORCH_CUDA_ARCH_LIST cannot be used; the message is one line that says why."""


def cuda_architectures() -> list[str]:
    """Architectures to build for, such as `9.0` or `9.0+PTX`: none that the kernels cannot run on, none twice.

    They are those of $TORCH_CUDA_ARCH_LIST (`8.0 9.0`, `7.5;9.0+PTX`, `Hopper`), and those of the visible GPUs that
    these do not hold; without either, 8.0 and 9.0.

    Raises:
        ArchitectureError: if the list has a word that is no architecture, or nothing from 8.0 on.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    found: list[str] = []
    for architecture in expand(listed):
        if capability_of(architecture) >= OLDEST and architecture not in found:
            found.append(architecture)
    for capability in visible_capabilities():
        if not holds(found, capability):
            found.append("{}.{}".format(*capability))
    if listed.strip() and not found:
        raise ArchitectureError(
            f"TORCH_CUDA_ARCH_LIST={listed!r}: the kernels need 8.0 (A100) or later; unset it, or add 8.0 or 9.0"
        )
    return found or DEFAULT.split()


def expand(listed: str) -> list[str]:
    """The numbers of a list in which architectures may have names.

    Raises:
        ArchitectureError: for a word that is neither.
    """
    numbers = []
    for word in listed.replace(";", " ").replace(",", " ").split():
        if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", word):
            numbers.append(word)
        elif (name := word.split("+")[0].lower()) in NAMED:
            numbers += NAMED[name].split()
        else:
            known = nearest(word, (name.capitalize() for name in NAMED))
            raise ArchitectureError(f"TORCH_CUDA_ARCH_LIST: {word} is no architecture; write 8.0 9.0 or a name{known}")
    return numbers


def visible_capabilities() -> list[Capability]:
    """Compute capabilities of this process's GPUs, each once, without those that the kernels cannot run on."""
    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return sorted(capability for capability in found if capability >= OLDEST)


def holds(architectures: list[str], capability: Capability) -> bool:
    """Whether a build for these architectures runs on a GPU of this capability.

    Machine code runs on its own generation, from its own number on; `9.0a` on 9.0 only; PTX on everything later.
    """
    for architecture in architectures:
        built = capability_of(architecture)
        if architecture.endswith("+PTX") and capability >= built:
            return True
        same = built[0] == capability[0] and built[1] <= capability[1]
        if same and (built == capability or not architecture.removesuffix("+PTX").endswith("a")):
            return True
    return False


def capability_of(architecture: str) -> Capability:
    """`9.0+PTX` -> (9, 0)."""
    major, minor = architecture.removesuffix("+PTX").rstrip("af").split(".")
    return int(major), int(minor)


def nvcc_flags(architectures: list[str]) -> list[str]:
    """nvcc's options for these architectures."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
