"""Load a base from safetensors without a copy of it in each rank's host memory.

The ranks of a node map the same files into memory and share their pages. A tensor that is stored in the wanted dtype is
used in place, without further host memory. Otherwise the tensors are converted or copied to the GPU one by one, with
host memory for one tensor. `from_pretrained(...).to(device)` would first hold the whole model in each rank: 8 x 22 GB
for T5-XXL in bf16 from a float32 checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from hdscale.bases.interface import Base
from hdscale.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; [] if it has none.

    Raises:
        UserError: if the index cannot be read, or names files that do not exist.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} cannot be read ({error}); fetch the checkpoint again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {missing[0]}, which {INDEX} names; fetch the checkpoint again")
    return [folder / name for name in names]


def has_own_head(config: PretrainedConfig) -> bool:
    """Whether checkpoints with this configuration have a head of their own; the weights tell where there are any."""
    return not getattr(config, "scale_decoder_outputs", False)


def load_mapped(
    build: Callable[[bool], Base], folder: Path, files: list[Path], dtype: torch.dtype, device: str | torch.device
) -> Base:
    """A base with the weights of a folder.

    Args:
        build: makes the base on the meta device, with or without a head of its own.
        folder: of the checkpoint.
        files: its safetensors files.
        dtype, device: of the weights.

    Raises:
        UserError: for a file that cannot be read, a missing tensor, or a tensor of another shape.
    """

    def stored() -> Iterator[tuple[str, Tensor, str]]:
        for file in files:
            with opened(file) as tensors:
                for name in tensors.keys():
                    if name in wanted:
                        # memory-mapped: no copy is made if neither dtype nor device changes
                        yield name, tensors.get_tensor(name).to(device=device, dtype=dtype), str(file)

    own_head = False
    for file in files:
        with opened(file) as tensors:
            own_head = own_head or "lm_head.weight" in tensors.keys()
    base = build(own_head)
    wanted = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    fill(base, stored(), str(folder))
    if (folder / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    return base


def adopt(base: Base, tensors: Mapping[str, Tensor], name: str) -> None:
    """Make tensors the weights of a base on the meta device, without copying them.

    Args:
        base: its parameters are replaced.
        tensors: by name; of tied weights one is enough.
        name: of where they come from, for errors.

    Raises:
        UserError: for a missing tensor, or a tensor of another shape.
    """
    fill(base, ((key, tensor, name) for key, tensor in tensors.items()), name)


def fill(base: Base, tensors: Iterable[tuple[str, Tensor, str]], origin: str) -> None:
    """Replace all meta parameters of a base.

    Args:
        base: its parameters are replaced, and those that share one tensor go on sharing one.
        tensors: name, tensor, and where it comes from; other names than the base's are passed over.
        origin: of all of them.

    Raises:
        UserError: for a missing tensor, or a tensor of another shape.
    """
    tied: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    groups = {name: names for names in tied.values() for name in names}
    missing = {names[0] for names in tied.values()}
    for name, tensor, place in tensors:
        if name in groups and groups[name][0] in missing:
            put(base, groups[name], tensor, place)
            missing.discard(groups[name][0])
    if missing:
        raise UserError(f"{origin} has no tensor {sorted(missing)[0]} ({len(missing)} are missing); fetch it again")


def opened(file: Path) -> safe_open:
    """A safetensors file, memory-mapped."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a complete safetensors file ({error}); fetch the checkpoint again") from error


def put(base: nn.Module, names: list[str], tensor: Tensor, origin: str) -> None:
    """Replace the meta parameter that all these names share by a tensor.

    Raises:
        UserError: if the tensor has another shape.
    """
    parameter = nn.Parameter(tensor)
    for name in names:
        module_name, _, leaf = name.rpartition(".")
        module = base.get_submodule(module_name)
        expected = tuple(getattr(module, leaf).shape)
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"{origin}: {name} has shape {tuple(tensor.shape)}, but config.json says {expected}; "
                "fetch the checkpoint again"
            )
        module.register_parameter(leaf, parameter)
