"""Exports: the trainable parameters alone, `hdscale_adapter.safetensors`, and how to build the model again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdscale.bases.fingerprint import fingerprint_weights
from hdscale.bases.sizes import BUILT_IN, resolve_name
from hdscale.errors import UserError
from hdscale.files import atomic_path, write_text
from hdscale.modeling.config import CONFIG_FILE, HyperdecoderConfig

WEIGHTS_FILE = "hdscale_adapter.safetensors"
FORMAT_VERSION = 1


def write_export(config: HyperdecoderConfig, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write a model's trainable parameters and its configuration.

    Args:
        config: of the model.
        tensors: the trainable parameters by name.
        folder: created if it does not exist; its files are replaced one by one, each atomically.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = config.to_dict()
    written["model"]["init_adapter"] = None
    written["base_fingerprint"] = base_fingerprint(config)
    written["format_version"] = FORMAT_VERSION
    # the weights last: a folder that has weights is complete
    write_text(folder / CONFIG_FILE, json.dumps(written, indent=2))
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)


def base_fingerprint(config: HyperdecoderConfig) -> str | None:
    """The fingerprint of the base's weights; None for random weights and for hub ids, which have no local folder."""
    name = resolve_name(config.model.name)
    return None if name in BUILT_IN or not Path(name).is_dir() else fingerprint_weights(name)


def read_config(folder: str | Path, base: str | None = None) -> HyperdecoderConfig:
    """The configuration of an export.

    Args:
        folder: an export.
        base: hub id or folder of the base, if it has moved.

    Raises:
        UserError: for a folder that is not an export, or if the base's weights are not those of the training.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE}; give the adapter/ folder of a run or of `hdscale convert`")
    config = HyperdecoderConfig.from_file(path)
    if base is not None:
        config.model.name = base
    written = json.loads(path.read_text()).get("base_fingerprint")
    found = base_fingerprint(config)
    if written and found and written != found:
        raise UserError(
            f"{folder}: was trained with other base weights than those of '{config.model.name}' "
            f"(fingerprint {written[:12]}, found {found[:12]}); give the folder of the right ones"
        )
    return config


def read_trainables(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an export, by name.

    Raises:
        UserError: for a folder without an export, or a damaged file.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE}; give the adapter/ folder of a run or of `hdscale convert`")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from error


def check_tasks(tasks: list[str], folder: str | Path) -> None:
    """Check that a task-conditioned model has the tasks of an export in the same order, as their vectors have no names.

    Raises:
        UserError: for other tasks, or another order.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return
    written = HyperdecoderConfig.from_file(path).tasks
    if written != tasks:
        raise UserError(
            f"{folder}: was trained on the tasks {', '.join(written)}, this model has {', '.join(tasks)}; "
            "a task-conditioned model needs the same ones in the same order"
        )


def copy_trainables(folder: str | Path, parameters: Mapping[str, Tensor]) -> None:
    """Copy an export's tensors into the trainable parameters of a model.

    Raises:
        UserError: naming the first tensors that are missing, unknown, or of another shape.
    """
    tensors, path = read_trainables(folder), Path(folder) / WEIGHTS_FILE
    missing = [name for name in parameters if name not in tensors]
    unknown = [name for name in tensors if name not in parameters]
    if missing or unknown:
        found = [f"lacks {missing[:3]}"] if missing else []
        found += [f"has unknown {unknown[:3]}"] if unknown else []
        raise UserError(f"{path}: tensors of another model: {'; '.join(found)}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, the model needs {list(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
