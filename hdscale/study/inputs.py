"""What the plan's formulas need to know of a configuration: the base's shape, the work of a rank, the parameters."""

from __future__ import annotations

import torch

from hdscale.bases import sizes
from hdscale.config import Config
from hdscale.modeling.model import build_model
from hdscale.modeling.parameters import ParameterCount, count_parameters
from hdscale.modeling.settings import MethodSettings
from hdscale.resolve import resolve_model
from hdscale.study.memory_model import Architecture, Work

Sides = dict[str, tuple[str, int]]
"""{"encoder" or "decoder": (kind of adapter, its size A; 0: no adapter)}."""


def architecture(config: Config) -> Architecture:
    """The base's shape, from its configuration alone."""
    base = sizes.architecture(config.model)
    dropout = base.dropout_rate if config.model.dropout is None else config.model.dropout
    return Architecture(
        base.d_model,
        base.d_ff,
        base.num_heads,
        base.d_kv,
        base.num_layers,
        base.num_decoder_layers,
        base.vocab_size,
        "gated" in base.feed_forward_proj,
        dropout,
        base.model_type == "umt5",
    )


def work_of(config: Config, rows: int, device: str, sides: Sides) -> Work:
    """What a rank computes for a micro-batch of `rows` rows of the greatest length."""
    encoder, decoder = sides["encoder"], sides["decoder"]
    return Work(
        rows=rows,
        source=config.data.max_source_length,
        target=config.data.max_target_length,
        dtype_bytes=2 if config.train.dtype == "bf16" else 4,
        device=device,
        checkpointing=config.model.activation_checkpointing,
        attention=config.model.attention,
        encoder_dim=encoder[1],
        decoder_dim=decoder[1],
        encoder_passes=2 if encoder[0] == "generated" else 1,
        generated=decoder[0] in ("generated", "task"),
        keeps_generated=config.method.backend == "torch",
        trains_base=config.method.name == "full_finetuning",
        adapts_self_attention=adapts_self_attention(config.method),
        label_smoothing=config.train.label_smoothing,
    )


def adapts_self_attention(method: MethodSettings) -> bool:
    """Whether something in the decoder's self-attentions trains: their linears, prefixes, or (Hyperformer) norms."""
    lora = method.lora.attention != "cross"
    if method.name in ("lora", "modular"):
        return lora
    if method.name == "hyperdecoder" and method.decoder.adapter in ("task", "generated"):
        forms = method.decoder.form.split("+")
        return "prefix" in forms or ("lora" in forms and lora)
    return method.name in ("hyperformer", "hyperformer++", "hyperprompt")


def counted(config: Config) -> tuple[ParameterCount, Sides, int]:
    """(parameter count, kind and size of each side's adapters, parameters of the decoder's hypernetwork heads).

    The model is built on the meta device: no memory is allocated for it.
    """
    model = build_model(resolve_model(config), dtype=torch.float32, device="meta")
    count = count_parameters(model)
    method = model.config.method
    sides: Sides = {}
    for name in ("encoder", "decoder"):
        side = getattr(method, name)
        kind = side.adapter
        if method.name == "adapter":
            kind = "manual"
        elif method.name == "task_hypernet":
            kind = "task"
        elif method.name != "hyperdecoder":
            # other methods keep about as many activations as an adapter with as many parameters
            kind = "manual"
        sides[name] = (kind, 0 if kind == "none" else side.dim)
    heads = sum(
        parameter.numel()
        for name, parameter in model.method.named_parameters()
        if name.startswith("decoder.") and ".adapter_heads." in name
    )
    return count, sides, heads
