"""The methods: one small file each, found by name here.

A method is an `nn.Module` that owns all of its trainables and says, for a batch, what adapts the encoder and what
adapts the decoder. To add one, write a file with a subclass of `Method` and put it into `METHODS`.
"""

from __future__ import annotations

from hdscale.errors import UserError, nearest
from hdscale.modeling.methods.full import FullFinetuning
from hdscale.modeling.methods.hyperdecoder import AdapterMethod, SidesMethod, TaskHypernet
from hdscale.modeling.methods.hyperformer import Hyperformer, HyperformerPlusPlus
from hdscale.modeling.methods.hyperprompt import HyperPrompt
from hdscale.modeling.methods.interface import Method, settled
from hdscale.modeling.methods.lora import Lora
from hdscale.modeling.methods.modular import Modular
from hdscale.modeling.settings import MethodSettings

METHODS: dict[str, type[Method]] = {
    "hyperdecoder": SidesMethod,
    "adapter": AdapterMethod,
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
        UserError: for an unknown name, naming the nearest.
    """
    if settings.name not in METHODS:
        raise UserError(f"method.name={settings.name}: unknown method{nearest(settings.name, METHODS)}")
    return METHODS[settings.name]


__all__ = ["METHODS", "Method", "method_class", "settled"]
