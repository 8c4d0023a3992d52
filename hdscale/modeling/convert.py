"""Checkpoints of the authors' released implementation (transformers 4.14, 2022), converted to exports."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hdscale.bases.loading import load_base
from hdscale.bases.settings import ModelSettings
from hdscale.bases.sizes import BUILT_IN
from hdscale.data.tasks.aliases import canonical
from hdscale.errors import UserError
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.model import build_model
from hdscale.modeling.settings import HypernetSettings, MethodSettings, SideSettings

BLOCK = "{side}.block.{layer}.layer.{sub}.adapter_layer.adapter_{direction}_manual.{kind}"
FEED_FORWARD = {"encoder": 1, "decoder": 2}
"""Index of the feed-forward sub-layer in a block."""

# {hdscale's name: the release's name} of a generated side
GENERATOR = {
    "hypernetwork.layer_embedding.weight": "param_gen.layer_embed.weight",
    "hypernetwork.linear.weight": "param_gen.decoder.linear1.weight",
    "hypernetwork.linear.bias": "param_gen.decoder.linear1.bias",
    "hypernetwork.adapter_heads.down_weight": "param_gen.decoder.weight_down.weight",
    "hypernetwork.adapter_heads.down_bias": "param_gen.decoder.weight_down.bias",
    "hypernetwork.adapter_heads.up_weight": "param_gen.decoder.weight_up.weight",
    "hypernetwork.adapter_heads.up_bias": "param_gen.decoder.weight_up.bias",
    "hypernetwork.adapter_heads.down_bias_weight": "param_gen.decoder.bias_down.weight",
    "hypernetwork.adapter_heads.down_bias_bias": "param_gen.decoder.bias_down.bias",
    "hypernetwork.adapter_heads.up_bias_weight": "param_gen.decoder.bias_up.weight",
    "hypernetwork.adapter_heads.up_bias_bias": "param_gen.decoder.bias_up.bias",
}
MLP = {f"embedding.mlp.{i}.{kind}": f"mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
TASKS = {"task_embedding.weight": "adapter_task_embedding.weight"}


def side_kind(state: dict[str, Tensor], side: str) -> Literal["none", "manual", "task", "generated"]:
    """The kind of adapters that a side has in the release, from the names in its state dict."""
    if f"{side}.param_gen.layer_embed.weight" in state:
        return "task" if f"{side}.adapter_task_embedding.weight" in state else "generated"
    if BLOCK.format(side=side, layer=0, sub=FEED_FORWARD[side], direction="down", kind="weight") in state:
        return "manual"
    return "none"


def side_names(state: dict[str, Tensor], side: str, kind: str, layers: int) -> dict[str, str]:
    """{hdscale's name: the release's name} of a side's trainable parameters."""
    names: dict[str, str] = {}
    if kind == "manual" or (kind == "generated" and side == "encoder"):
        for layer in range(layers):
            for direction in ("down", "up"):
                for part in ("weight", "bias"):
                    names[f"adapters.{layer}.{direction}.{part}"] = BLOCK.format(
                        side=side, layer=layer, sub=FEED_FORWARD[side], direction=direction, kind=part
                    )
        names = {f"method.{side}.{ours}": theirs for ours, theirs in names.items()}
    if kind in ("task", "generated"):
        rest = dict(GENERATOR)
        if kind == "task":
            rest |= TASKS
        elif f"{side}.mlp.0.weight" in state:
            rest |= MLP
        names |= {f"method.{side}.{ours}": f"{side}.{theirs}" for ours, theirs in rest.items()}
    return names


def count_layers(state: dict[str, Tensor], side: str) -> int:
    """Number of blocks of a stack that the state dict has tensors of."""
    prefix = f"{side}.block."
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)), default=-1)


def convert_state(
    state: dict[str, Tensor], model: ModelSettings, tasks: list[str] | None = None, normed_input: bool = False
) -> tuple[HyperdecoderConfig, dict[str, Tensor]]:
    """The configuration and the trainable parameters of a released state dict.

    Args:
        state: with the release's names.
        model: the base that it was trained on.
        tasks: names of the tasks in the order of their embeddings, for task-conditioned models.
        normed_input: whether the release was configured with `adapter_norm_input`.

    Raises:
        UserError: if the state dict has no adapters, or lacks a tensor.
    """
    sides, trainables = {}, {}
    hypernet = HypernetSettings()
    for side in ("encoder", "decoder"):
        kind = side_kind(state, side)
        if kind != "none" and (layers := count_layers(state, side)) == 0:
            layers = state[f"{side}.param_gen.layer_embed.weight"].shape[0]
        names = side_names(state, side, kind, layers) if kind != "none" else {}
        for ours, theirs in names.items():
            if theirs not in state:
                raise UserError(f"the released state dict has a {kind} {side} but lacks '{theirs}'")
            trainables[ours] = state[theirs].float()
        dim = 0
        if kind == "manual":
            dim = state[
                BLOCK.format(side=side, layer=0, sub=FEED_FORWARD[side], direction="down", kind="weight")
            ].shape[0]
        elif kind != "none":
            dim = state[f"{side}.param_gen.decoder.bias_down.weight"].shape[0]
            hypernet.bottleneck = state[f"{side}.param_gen.decoder.linear1.weight"].shape[0]
            hypernet.layer_embedding = state[f"{side}.param_gen.layer_embed.weight"].shape[1]
            if kind == "generated":
                hypernet.mlp = f"{side}.mlp.0.weight" in state
            else:
                count = state[f"{side}.adapter_task_embedding.weight"].shape[0]
                tasks = [canonical(name) for name in tasks or [f"task{index}" for index in range(count)]]
                if len(tasks) not in (count, count - 1):
                    raise UserError(f"--tasks names {len(tasks)} tasks, the state dict has embeddings of {count}")
                # the release's table has one row more than it has tasks, which is never trained
                embedding = f"method.{side}.task_embedding.weight"
                trainables[embedding] = trainables[embedding][: len(tasks)]
        if kind == "none":
            sides[side] = SideSettings("none")
        else:
            sides[side] = SideSettings(kind, dim, "layernorm" if normed_input else "hidden")
    if all(side.adapter == "none" for side in sides.values()):
        raise UserError(
            "the state dict has no adapters of the released implementation (no 'adapter_layer' or 'param_gen')"
        )
    method = MethodSettings("hyperdecoder", sides["encoder"], sides["decoder"], hypernet)
    return HyperdecoderConfig(model, method, tasks or []), trainables


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a .bin or .pt file without running pickled code.

    Raises:
        UserError: for a file that does not exist, cannot be read, or contains other things than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable state dict ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: must contain a dictionary of tensors")
    return state


def check_base(state: dict[str, Tensor], model: ModelSettings, path: str) -> None:
    """Raise UserError if the state dict has other weights of T5 than the base that is named.

    The release saves the whole model. A base of another origin may have the same shapes, and would be decoded with
    adapters that were trained on other weights. Built-in sizes have no weights to compare.
    """
    if model.name in BUILT_IN:
        return
    base = load_base(model, torch.float32).state_dict()
    compared = [name for name in base if name in state]
    for name in compared:
        ours, theirs = base[name], state[name].float()
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5):
            raise UserError(
                f"{path}: {name} differs from that of base '{model.name}', so it was trained on another base; name "
                "that one by --model"
            )


def convert_checkpoint(
    path: str | Path, folder: str | Path, model: ModelSettings, tasks: list[str] | None, normed_input: bool
) -> tuple[HyperdecoderConfig, dict[str, Tensor]]:
    """Write the export of a released checkpoint.

    Args:
        path: the release's pytorch_model.bin.
        folder: of the export.
        model, tasks, normed_input: as for `convert_state`.

    Returns:
        the configuration and the trainable parameters by name.

    Raises:
        UserError: for a file that cannot be read, or that does not fit the base.
    """
    state = read_state(path)
    config, trainables = convert_state(state, model, tasks, normed_input)
    check_base(state, model, str(path))
    adapted = build_model(config, device="meta")
    for name, parameter in adapted.trainable_parameters().items():
        shape = list(trainables[name].shape) if name in trainables else None
        if shape != list(parameter.shape):
            raise UserError(
                f"{path}: {name} should have shape {list(parameter.shape)} for base '{model.name}', "
                f"found {shape or 'no such tensor'}"
            )
    adapted.save_pretrained(folder, trainables)
    return config, trainables
