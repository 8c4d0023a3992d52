"""The methods: one small file each, found by name here.

A method is an `nn.Module` that owns all of its trainable parameters, and computes for a batch what adapts the encoder
and what adapts the decoder. To add one, write a file with a subclass of `Method` and add it to `METHODS`.
"""

from __future__ import annotations

import copy

from hdscale.errors import UserError, nearest
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.methods.completion import complete
from hdscale.modeling.methods.full import FullFinetuning
from hdscale.modeling.methods.hyperdecoder import AdapterBaseline, Hyperdecoder, TaskHypernet
from hdscale.modeling.methods.hyperformer import Hyperformer, HyperformerPlusPlus
from hdscale.modeling.methods.hyperprompt import HyperPrompt
from hdscale.modeling.methods.interface import Method
from hdscale.modeling.methods.lora import Lora
from hdscale.modeling.methods.modular import Modular
from hdscale.modeling.settings import MethodSettings

METHODS: dict[str, type[Method]] = {
    "hyperdecoder": Hyperdecoder,
    "adapter": AdapterBaseline,
    "task_hypernet": TaskHypernet,
    "modular": Modular,
    "lora": Lora,
    "hyperformer": Hyperformer,
    "hyperformer++": HyperformerPlusPlus,
    "hyperprompt": HyperPrompt,
    "full_finetuning": FullFinetuning,
}


def method_class(settings: MethodSettings) -> type[Method]:
    """The class of a method by its name.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if settings.name not in METHODS:
        raise UserError(f"method.name={settings.name}: unknown method{nearest(settings.name, METHODS)}")
    return METHODS[settings.name]


def complete_config(config: HyperdecoderConfig) -> type[Method]:
    """Check and complete a configuration in place (see `complete`), and return the method's class.

    Raises:
        UserError: for anything that is wrong with `method.*`; before anything is loaded.
    """
    cls = method_class(config.method)
    complete(cls, config)
    return cls


def check_method(config: HyperdecoderConfig) -> None:
    """Raise UserError for anything wrong in `method.*`, budget included; loads and changes nothing."""
    complete_config(copy.deepcopy(config))


__all__ = ["METHODS", "Method", "check_method", "complete_config", "method_class"]
