"""Built-in sizes with random weights, and the architecture of a base by its name, without loading weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, T5Config

from hdscale.bases.embedded import asset_folder
from hdscale.bases.families import FAMILIES, family_of
from hdscale.bases.interface import StackSizes
from hdscale.bases.settings import ModelSettings
from hdscale.errors import UserError, nearest

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


def stack_sizes(config: PretrainedConfig, stack: str) -> StackSizes:
    """Sizes of the "encoder" or the "decoder" of a base with this configuration."""
    return family_of(config).stack_sizes(config, stack)


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
        UserError: for an unknown size, folder or hub id, or a model of another family.
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
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model.name: '{name}' is a {config.model_type} model; hdscale adapts these: {known}")
    return config
