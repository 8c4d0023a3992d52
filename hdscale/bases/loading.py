"""Load a base: a checkpoint given as hub id or folder, or a built-in size with random weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from hdscale.bases.families import family_of
from hdscale.bases.interface import Base
from hdscale.bases.packing import SMALLEST_PACKED_HEAD
from hdscale.bases.settings import ModelSettings
from hdscale.bases.sizes import BUILT_IN, architecture, base_config, resolve_name, stack_sizes
from hdscale.bases.weights import adopt, has_own_head, load_mapped, weight_files
from hdscale.errors import UserError, nearest

log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bars (one per rank), and its advice to untie all embeddings.

    Following that advice would lose the encoder's embeddings: only the head is separate from v1.1 on.
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


def load_base(settings: ModelSettings, dtype: torch.dtype, device: str | torch.device = "cpu") -> Base:
    """The base model in evaluation mode, with every parameter frozen.

    Args:
        settings: `model.*`.
        dtype: of the weights.
        device: of the weights; "meta" builds the architecture without weights, in seconds at any size.

    Raises:
        UserError: for a base that cannot be found, read, or adapted.
    """
    check_settings(settings)
    meta = torch.device(device).type == "meta"
    config = architecture(settings) if meta else base_config(settings)
    if settings.dropout is not None:
        config.dropout_rate = settings.dropout
    config._attn_implementation = settings.attention
    size = stack_sizes(config, "encoder").d_kv
    if settings.packing and torch.device(device).type == "cuda" and size < SMALLEST_PACKED_HEAD:
        raise UserError(
            f"model.packing=true: FlexAttention needs heads of at least {SMALLEST_PACKED_HEAD} numbers on a GPU, and "
            f"'{settings.name}' has {size}; use model.packing=false"
        )
    name = resolve_name(settings.name)
    if meta:
        base = empty_base(config, dtype, own_head=has_own_head(config))
    elif name in BUILT_IN:
        log.warning("base %s is a built-in size with random weights, for counting, planning and benchmarks only", name)
        base = random_base(config, dtype, device)
    elif Path(name).is_dir() and (files := weight_files(Path(name))):
        base = load_mapped(lambda own_head: empty_base(config, dtype, own_head), Path(name), files, dtype, device)
    else:
        base = base_of_transformers(name, settings.revision, config, dtype, device)
    base.eval().requires_grad_(False)
    base.checkpoint_activations(settings.activation_checkpointing)
    return base


def check_settings(settings: ModelSettings) -> None:
    """Raise UserError for values of `model.*` that are not possible."""
    if settings.attention not in ("sdpa", "eager"):
        raise UserError(f"model.attention={settings.attention}{nearest(settings.attention, ['sdpa', 'eager'])}")
    if settings.activation_checkpointing not in ("none", "encoder", "decoder", "all"):
        raise UserError(
            f"model.activation_checkpointing={settings.activation_checkpointing}; known: none, encoder, decoder, all"
        )
    if settings.dropout is not None and not 0.0 <= settings.dropout < 1.0:
        raise UserError(f"model.dropout={settings.dropout} must be at least 0 and below 1")


def empty_base(config: PretrainedConfig, dtype: torch.dtype, own_head: bool) -> Base:
    """The base on the meta device."""
    with torch.device("meta"):
        return family_of(config)(config, own_head).to(dtype)


def random_base(config: PretrainedConfig, dtype: torch.dtype, device: str | torch.device) -> Base:
    """The base as transformers initialises it, with a head of its own where checkpoints of its kind have one."""
    own_head = has_own_head(config)
    with torch.device(device):
        theirs = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
        tensors = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
        if own_head:
            # transformers 5 builds every model of the T5 family with a tied head
            head = torch.empty_like(theirs.lm_head.weight)
            tensors["lm_head.weight"] = torch.nn.init.normal_(head, std=config.d_model**-0.5)
    base = empty_base(config, dtype, own_head)
    adopt(base, tensors, "the built-in size")
    return base


def base_of_transformers(
    name: str, revision: str | None, config: PretrainedConfig, dtype: torch.dtype, device: str | torch.device
) -> Base:
    """The base that transformers loads: from the hub, or from a folder without safetensors.

    Raises:
        UserError: if transformers cannot load it.
    """
    try:
        with quiet_loading():
            theirs = AutoModelForSeq2SeqLM.from_pretrained(name, config=config, revision=revision, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.name: cannot load the weights of '{name}' ({reason})") from error
    own_head = theirs.lm_head.weight is not theirs.get_input_embeddings().weight
    base = empty_base(config, dtype, own_head)
    adopt(base, {key: value.detach().to(device) for key, value in theirs.named_parameters()}, name)
    base.generation_config = theirs.generation_config
    return base
