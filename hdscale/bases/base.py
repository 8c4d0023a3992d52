"""The frozen base: T5-family checkpoints given as hub id or folder, and built-in sizes with random weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from hdscale.bases.blocks import adapt_blocks, set_activation_checkpointing
from hdscale.bases.embedded import asset_folder
from hdscale.bases.interface import StackSizes
from hdscale.bases.settings import ModelSettings
from hdscale.bases.weights import load_mapped, weight_files
from hdscale.errors import UserError, nearest

log = logging.getLogger(__name__)

FAMILIES = ("t5", "mt5")
"""Model types of transformers whose blocks can be adapted (T5 v1.0, v1.1, LM-adapted, FLAN and ByT5 are all "t5")."""

# name: (d_model, d_ff, d_kv, heads, layers of each stack); Raffel et al. 2020 and the v1.1 release
V1_1_SIZES = {
    "t5-v1_1-small": (512, 1024, 64, 6, 8),
    "t5-v1_1-base": (768, 2048, 64, 12, 12),
    "t5-v1_1-large": (1024, 2816, 64, 16, 24),
    "t5-v1_1-xl": (2048, 5120, 64, 32, 24),
    "t5-v1_1-xxl": (4096, 10240, 64, 64, 24),
}
V1_0_SIZES = {
    "t5-small": (512, 2048, 64, 8, 6),
    "t5-base": (768, 3072, 64, 12, 12),
    "t5-large": (1024, 4096, 64, 16, 24),
    "t5-3b": (1024, 16384, 128, 32, 24),
    "t5-11b": (1024, 65536, 128, 128, 24),
}
TINY_SIZES = {
    "tiny-1": (48, 96, 16, 3, 2),
    "tiny-2": (96, 192, 24, 4, 3),
    "tiny-4": (192, 384, 32, 6, 4),
}
"""Very small v1.1 models with the packaged tokenizer, for trial studies: each is about four times the one before."""
BUILT_IN = {**V1_1_SIZES, **V1_0_SIZES, **TINY_SIZES}
VOCABULARY = 32128
# hub ids whose architecture is known without network access
HUB_SIZES = {
    **{f"google/t5-{size}-lm-adapt": f"t5-v1_1-{size}" for size in ("small", "base", "large", "xl", "xxl")},
    **{f"google/t5-v1_1-{size}": f"t5-v1_1-{size}" for size in ("small", "base", "large", "xl", "xxl")},
    **{f"google-t5/{size}": size for size in V1_0_SIZES},
}
TINY_VOCABULARY = 2048
"""Room for every token of the packaged tokenizer."""


def built_in_config(name: str) -> T5Config:
    """The architecture of a built-in size: v1.1 (gated GELU, untied head) or v1.0 (ReLU, tied head)."""
    d_model, d_ff, d_kv, heads, layers = BUILT_IN[name]
    v1_1 = name not in V1_0_SIZES
    return T5Config(  # type: ignore[call-arg]  # transformers does not declare the arguments of its base class
        vocab_size=TINY_VOCABULARY if name in TINY_SIZES else VOCABULARY,
        d_model=d_model,
        d_ff=d_ff,
        d_kv=d_kv,
        num_heads=heads,
        num_layers=layers,
        feed_forward_proj="gated-gelu" if v1_1 else "relu",
        tie_word_embeddings=not v1_1,
        decoder_start_token_id=0,
    )


def scales_output(config: PretrainedConfig) -> bool:
    """Whether the decoder's output is multiplied by D**-0.5 before the head, as in v1.0 with its tied head."""
    return bool(getattr(config, "scale_decoder_outputs", False))


def stack_sizes(config: PretrainedConfig, stack: str) -> StackSizes:
    """Sizes of a base's "encoder" or "decoder"."""
    is_decoder = stack == "decoder"
    layers = config.num_decoder_layers if is_decoder else config.num_layers
    return StackSizes(layers, config.d_model, config.num_heads, config.d_kv, is_decoder)


def untie_head(base: PreTrainedModel) -> None:
    """Give a model that was built from a configuration a separate head, which checkpoints from v1.1 on have.

    transformers 5 ties the head for every configuration of the T5 family, and unties it while loading a checkpoint
    whose head differs. A model that is built without a checkpoint has to be untied explicitly.
    """
    if scales_output(base.config):
        return
    weight = torch.empty_like(base.lm_head.weight)
    if not weight.is_meta:
        torch.nn.init.normal_(weight, std=base.config.d_model**-0.5)
    base.lm_head.weight = torch.nn.Parameter(weight)
    base.all_tied_weights_keys.pop("lm_head.weight", None)


def resolve_name(name: str) -> str:
    """The packaged base's folder for "quickstart"; any other name unchanged."""
    return str(asset_folder()) if name == "quickstart" else name


def tokenizer_name(settings: ModelSettings) -> str:
    """Folder or hub id of the tokenizer: `model.tokenizer`, else the model's own; tiny sizes use the packaged one."""
    name = settings.tokenizer or settings.name
    return resolve_name("quickstart" if name in TINY_SIZES else name)


def architecture(settings: ModelSettings) -> PretrainedConfig:
    """The base's configuration for counting and checking: like `base_config`, but known hub ids need no network."""
    if settings.name in HUB_SIZES:
        return built_in_config(HUB_SIZES[settings.name])
    return base_config(settings)


def base_config(settings: ModelSettings) -> PretrainedConfig:
    """The base's configuration, without loading weights.

    Raises:
        UserError: for an unknown size, folder or hub id, or a model outside the T5 family.
    """
    name = resolve_name(settings.name)
    if name in BUILT_IN:
        return built_in_config(name)
    path = Path(name)
    if "/" not in name and not path.exists():
        raise UserError(
            f"model.name: no built-in size, folder or hub id '{name}'{nearest(name, [*BUILT_IN, 'quickstart'])}"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"model.name: {path}/config.json is missing; the folder must contain a transformers checkpoint")
    try:
        config = AutoConfig.from_pretrained(name, revision=settings.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.name: cannot read '{name}' ({reason}); on a machine without internet access, run `hdscale prepare` "
            "on one that has it, and give the folder"
        ) from error
    if config.model_type not in FAMILIES:
        raise UserError(f"model.name: '{name}' is a {config.model_type} model; hdscale adapts T5 and mT5 checkpoints")
    return config


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bars (one per rank), and its advice to untie all embeddings.

    Following that advice would lose the encoder's embeddings: see `untie_head`.
    """

    def is_wanted(record: logging.LogRecord) -> bool:
        return "tied weights mapping" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()
    logger.addFilter(is_wanted)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)
        if bars:
            transformers_logging.enable_progress_bar()


def load_base(
    settings: ModelSettings, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> T5ForConditionalGeneration:
    """The base model with every parameter frozen, its blocks able to apply an adaptation.

    Args:
        settings: `model.*`.
        dtype: of the weights.
        device: of the weights; "meta" builds the architecture without weights, in seconds at any size.

    Raises:
        UserError: for a base that cannot be found, read, or adapted.
    """
    if settings.attention not in ("sdpa", "eager"):
        raise UserError(f"model.attention={settings.attention}{nearest(settings.attention, ['sdpa', 'eager'])}")
    if settings.activation_checkpointing not in ("none", "encoder", "decoder", "all"):
        raise UserError(
            f"model.activation_checkpointing={settings.activation_checkpointing}; known: none, encoder, decoder, all"
        )
    meta = torch.device(device).type == "meta"
    config = architecture(settings) if meta else base_config(settings)
    if settings.dropout is not None:
        if not 0.0 <= settings.dropout < 1.0:
            raise UserError(f"model.dropout={settings.dropout} must be at least 0 and below 1")
        config.dropout_rate = settings.dropout
    name = resolve_name(settings.name)
    if meta or name in BUILT_IN:
        config._attn_implementation = settings.attention
        with torch.device(device):
            base = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype, attn_implementation=settings.attention)
        untie_head(base)
        if not meta:
            log.warning(
                "base %s is a built-in size with random weights, for counting, planning and benchmarks only", name
            )
    elif Path(name).is_dir() and weight_files(Path(name)):
        config._attn_implementation = settings.attention
        with torch.device("meta"):
            base = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype, attn_implementation=settings.attention)
        with quiet_loading():
            base = load_mapped(base, Path(name), dtype, device, untie_head)
    else:
        try:
            with quiet_loading():
                base = AutoModelForSeq2SeqLM.from_pretrained(
                    name,
                    config=config,
                    revision=settings.revision,
                    dtype=dtype,
                    attn_implementation=settings.attention,
                ).to(device)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model.name: cannot load the weights of '{name}' ({reason})") from error
    base.requires_grad_(False)
    adapt_blocks(base)
    set_activation_checkpointing(base, settings.activation_checkpointing)
    return base
