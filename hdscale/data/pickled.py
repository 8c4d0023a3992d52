"""Hub weights in PyTorch's pickled format, rewritten once as safetensors."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from hdscale.errors import UserError

SHARD_SIZE = "2GB"
"""Large enough for few files, small enough for a login node: one shard at a time is held in memory."""
KEPT_NAME = "shared.weight"
"""Of tensors that share memory, the name under which T5's tied embeddings are loaded."""


def convert_pickled(folder: Path, names: Sequence[str]) -> list[str]:
    """Rewrite `pytorch_model*.bin` files as `model*.safetensors` in the same folder (the old files stay).

    Tensors are mapped from the files, not read; nothing but tensors is unpickled (`weights_only=True`).

    Returns:
        Names of the files written.

    Raises:
        UserError: a file holds anything but tensors by name, or the disk is full.
    """
    tensors: dict[str, Any] = {}
    for name in names:
        tensors |= read_tensors(folder / name)
    tensors = without_aliases(tensors)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".converting.") as made:
            save_torch_state_dict(tensors, made, max_shard_size=SHARD_SIZE, safe_serialization=True)
            # the index last: a folder with it has all shards
            written = sorted(
                (path.name for path in Path(made).iterdir()), key=lambda name: (name.endswith(".json"), name)
            )
            for name in written:
                os.replace(Path(made) / name, folder / name)
                (folder / name).chmod(0o644)
    except OSError as error:
        raise UserError(
            f"weights cannot be converted in {folder} ({error.strerror or error}); free some space"
        ) from error
    return written


def read_tensors(path: Path) -> dict[str, Any]:
    """{name: tensor} of a pickled state dict."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before PyTorch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a file of tensors that can be read safely ({reason}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds something else than tensors by name; give a transformers checkpoint")
    return state


def without_aliases(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors, each memory once: safetensors cannot say that embeddings are tied, and loading ties them
    again."""
    kept: dict[tuple[int, Any], str] = {}
    for name in sorted(tensors, key=lambda name: (name != KEPT_NAME, name)):
        tensor = tensors[name]
        kept.setdefault((tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else (id(tensor), ()), name)
    return {name: tensors[name] for name in kept.values()}
