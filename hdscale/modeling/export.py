"""Writing and reading the trainables alone: `hdscale_adapter.safetensors` + `hdscale_config.json`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdscale.bases.base import BUILT_IN, resolve_name
from hdscale.errors import UserError
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.model import AdaptedModel, build_model

log = logging.getLogger(__name__)

WEIGHTS = "hdscale_adapter.safetensors"
CONFIG = "hdscale_config.json"
FORMAT_VERSION = 1


def save_pretrained(model: AdaptedModel, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write a model's trainables and how to build it again.

    Args:
        model: the model.
        folder: created where missing; files in it are replaced one by one, whole.
        tensors: the trainables by name where they live elsewhere (float32 masters); default: the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        parameters = dict(model.named_parameters())
        tensors = {name: parameters[name].detach() for name in model.trainable_names()}
    config = model.config.to_dict()
    config["model"]["init_adapter"] = None
    config["base_fingerprint"] = base_fingerprint(model.config)
    config["format_version"] = FORMAT_VERSION
    # the weights last: a folder with weights is a whole one
    write_whole(folder / CONFIG, json.dumps(config, indent=2).encode())
    temporary = folder / (WEIGHTS + ".tmp")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
    temporary.replace(folder / WEIGHTS)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def base_fingerprint(config: HyperdecoderConfig) -> str | None:
    """What identifies the base's weights; None for random ones and for hub ids that no folder holds."""
    name = resolve_name(config.model.name)
    if name in BUILT_IN or not Path(name).is_dir():
        return None
    from hdscale.bases.fingerprint import fingerprint_weights

    return fingerprint_weights(name)


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    base: str | None = None,
) -> AdaptedModel:
    """Build a model from an export.

    Args:
        folder: what `save_pretrained` wrote.
        dtype, device: as for `build_model`.
        base: hub id or folder of the base, where it has moved.

    Raises:
        UserError: for a folder that is no export, tensors that do not fit, or another base's weights.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG}; give the adapter/ folder of a run or of `hdscale convert`")
    config = HyperdecoderConfig.from_file(folder / CONFIG)
    if base is not None:
        config.model.name = base
    written = json.loads((folder / CONFIG).read_text()).get("base_fingerprint")
    found = base_fingerprint(config)
    if written and found and written != found:
        raise UserError(
            f"{folder}: was trained on other base weights than '{config.model.name}' holds "
            f"(fingerprint {written[:12]}, found {found[:12]}); give the folder of the right ones"
        )
    model = build_model(config, dtype, device)
    if torch.device(device).type != "meta":
        load_trainables(model, folder)
    return model


def read_trainables(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an export, by name.

    Raises:
        UserError: for a folder that holds none, or a torn file.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: no {WEIGHTS}; give the adapter/ folder of a run or of `hdscale convert`")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error


def check_tasks(model: AdaptedModel, folder: Path) -> None:
    """The learned vectors of tasks are told apart by order alone: it must be the export's.

    Raises:
        UserError: if a task-conditioned model has other tasks than the export.
    """
    if not model.method.needs_tasks or not (folder / CONFIG).is_file():
        return
    written = HyperdecoderConfig.from_file(folder / CONFIG).tasks
    if written != model.config.tasks:
        raise UserError(
            f"{folder}: was trained on the tasks {', '.join(written)}, this model has {', '.join(model.config.tasks)}; "
            "a task-conditioned model needs the same ones in the same order"
        )


def load_trainables(model: AdaptedModel, folder: str | Path) -> None:
    """Copy an export's tensors into a model's trainables.

    Raises:
        UserError: naming the first tensors that are missing, too many, or of another shape, or other tasks.
    """
    tensors = read_trainables(folder)
    path = Path(folder) / WEIGHTS
    check_tasks(model, Path(folder))
    parameters = dict(model.named_parameters())
    wanted = model.trainable_names()
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted]
    if missing or unknown:
        raise UserError(
            f"{path}: tensors of another model: "
            + "; ".join(
                f"{what} {names[:3]}" for what, names in (("lacks", missing), ("has unknown", unknown)) if names
            )
        )
    for name in wanted:
        if parameters[name].shape != tensors[name].shape:
            raise UserError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, the model needs {list(parameters[name].shape)}"
            )
    with torch.no_grad():
        for name in wanted:
            parameters[name].copy_(tensors[name])
