"""The GPUs that a plan knows, by their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from hdscale.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as results state it. memory: bytes that a program can have.
        bf16, tf32: dense matrix products, FLOP/s. bandwidth: of its memory, bytes/s.
        link: to the other GPUs of its node, bytes/s in one direction. network: to other nodes, bytes/s per GPU.
        gpus_per_node: in the usual machine.
    """

    name: str
    memory: float
    bf16: float
    tf32: float
    bandwidth: float
    link: float
    network: float
    gpus_per_node: int = 8


DEVICES = {
    "a100-40gb": Device("NVIDIA A100 40GB", 39.4 * GIB, 312e12, 156e12, 1.555e12, 300e9, 25e9),
    "a100-80gb": Device("NVIDIA A100 80GB", 79.2 * GIB, 312e12, 156e12, 2.039e12, 300e9, 25e9),
    "h100": Device("NVIDIA H100 80GB", 79.1 * GIB, 989e12, 494e12, 3.35e12, 450e9, 50e9),
    "h200": Device("NVIDIA H200 141GB", 139.8 * GIB, 989e12, 494e12, 4.8e12, 450e9, 50e9),
    "l40s": Device("NVIDIA L40S 48GB", 44.4 * GIB, 362e12, 183e12, 0.864e12, 32e9, 25e9),
    "a6000": Device("NVIDIA RTX A6000 48GB", 47.4 * GIB, 155e12, 77e12, 0.768e12, 32e9, 12e9),
    "v100-32gb": Device(
        "NVIDIA V100 32GB (no bf16: computed in fp32)", 31.7 * GIB, 15.7e12, 15.7e12, 0.9e12, 150e9, 12e9
    ),
}


def find_device(name: str) -> Device:
    """A GPU by its short name.

    Raises:
        UserError: naming the nearest known one.
    """
    key = name.lower()
    if key not in DEVICES:
        family = [one for one in DEVICES if key and one.startswith(key)]
        if family:
            raise UserError(f"--gpu {name} comes in several sizes; choose {' or '.join(family)}")
        raise UserError(f"--gpu {name}: unknown{nearest(key, DEVICES)}")
    return DEVICES[key]


def match_device(name: str) -> Device | None:
    """The GPU that a driver's name stands for, such as `NVIDIA A100-SXM4-80GB`; None where the plan has no figures."""
    lowered = name.lower()
    for key, device in DEVICES.items():
        family, _, size = key.partition("-")
        if family in lowered and size.removesuffix("gb") in lowered:
            return device
    return None
