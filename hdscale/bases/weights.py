"""Load a base from safetensors without a copy of it in each rank's host memory.

The ranks of a node map the same files into memory and share their pages. A tensor that is stored in the wanted dtype is
used in place, without further host memory. Otherwise the tensors are converted or copied to the GPU one by one, with
host memory for one tensor. `from_pretrained(...).to(device)` would first hold the whole model in each rank: 8 x 22 GB
for T5-XXL in bf16 from a float32 checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

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


def load_mapped(
    base: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device,
    untie_head: Callable[[PreTrainedModel], None],
) -> PreTrainedModel:
    """Give a model on the meta device the weights of a folder.

    Args:
        base: built from the folder's configuration on the meta device, head and embeddings tied.
        folder: with safetensors files.
        dtype, device: of the weights.
        untie_head: gives the model a separate head; called if the checkpoint has one.

    Raises:
        UserError: for a file that cannot be read, a missing tensor, or a tensor of another shape.
    """
    files = weight_files(folder)
    own_head = False
    for file in files:
        with opened(file) as tensors:
            own_head = own_head or "lm_head.weight" in tensors.keys()
    if own_head:
        untie_head(base)
    tied: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    groups = {name: names for names in tied.values() for name in names}
    missing = {names[0] for names in tied.values()}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():
                if name in groups and groups[name][0] in missing:
                    # memory-mapped: no copy is made if neither dtype nor device changes
                    tensor = tensors.get_tensor(name).to(device=device, dtype=dtype)
                    place(base, groups[name], tensor, file)
                    missing.discard(groups[name][0])
    if missing:
        raise UserError(f"{folder} has no tensor {sorted(missing)[0]} ({len(missing)} are missing); fetch it again")
    for name, buffer in list(base.named_buffers()):
        if buffer.is_meta:
            raise UserError(f"{folder}: the checkpoint does not contain the buffer {name}; load it with transformers")
    if (folder / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    return base.eval()


def opened(file: Path) -> safe_open:
    """A safetensors file, memory-mapped."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a complete safetensors file ({error}); fetch the checkpoint again") from error


def place(base: nn.Module, names: list[str], tensor: torch.Tensor, file: Path) -> None:
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
                f"{file}: {name} has shape {tuple(tensor.shape)}, but config.json says {expected}; "
                "fetch the checkpoint again"
            )
        module.register_parameter(leaf, parameter)
