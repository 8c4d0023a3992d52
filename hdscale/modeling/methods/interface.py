"""What every method implements."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hdscale.bases.interface import Adaptation
from hdscale.errors import UserError
from hdscale.modeling.conditioning import masked_mean
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.settings import MethodSettings

Encode = Callable[[Adaptation | None], Tensor]
"""Runs the base's encoder on the batch at hand with an adaptation: -> hidden states [B, S, D]."""


class Method(nn.Module):
    """An adaptation method: its trainables, and how they adapt the two stacks for a batch.

    Args:
        config: base, method and tasks.
        base: the base model (already frozen); only its configuration and modules may be read.
    """

    needs_tasks = False
    """Whether task ids condition the method (then a batch must bring them)."""
    trains_base = False
    """Whether some of the base's own parameters train (`base_trainables`)."""

    fixed: dict[str, Any] = {}
    """Options of `method.*` whose values the method's name decides."""

    def __init__(self, config: HyperdecoderConfig, base: nn.Module) -> None:
        super().__init__()

    @classmethod
    def options(cls, settings: MethodSettings) -> list[str]:
        """The options of `method.*` that the method has: keys, or beginnings of keys such as `decoder`."""
        return []

    @classmethod
    def sizes(cls, settings: MethodSettings) -> list[list[str]]:
        """Sizes that a budget can solve for, each a list of keys that take one value; the default first."""
        return []

    @classmethod
    def encoder_knows_instances(cls, settings: MethodSettings) -> bool:
        """Whether the encoder's adaptation differs between the instances of a batch; then it cannot be packed."""
        return True

    @classmethod
    def check_values(cls, config: HyperdecoderConfig) -> None:
        """Raise UserError for values that mean nothing to the method."""

    @classmethod
    def check(cls, config: HyperdecoderConfig) -> None:
        """Raise UserError for whatever is wrong with `method.*`, the budget included; nothing is loaded or changed."""
        settled(cls, copy.deepcopy(config))

    def encode(self, encode: Encode, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        """Hidden states [B, S, D] of the adapted encoder.

        Args:
            encode: runs the base's encoder with an adaptation.
            mask: [B, S], 1 for tokens and 0 for padding.
            task_ids: [B], or None.
        """
        return encode(None)

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation | None:
        """What adapts the decoder, given the encoding [B, S, D]."""
        return None

    def embed(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        """The vector [B, D] that conditions the decoder; the masked mean where nothing does."""
        return masked_mean(hidden, mask)

    def learning_rates(self, default: float) -> dict[str, float]:
        """Peak learning rates {name of a parameter of the method: rate} where they differ from `train.learning_rate`."""
        return {}

    def parts(self) -> dict[str, int]:
        """Trainable parameters of the method by part, for `hdscale params`."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.named_children()}

    def base_trainables(self, base: nn.Module) -> list[str]:
        """Names of the base's own parameters that the method trains (none, for most)."""
        return []


def settled(cls: type[Method], config: HyperdecoderConfig) -> None:
    """Refuse options that a method does not have, put in what its name decides, check the rest, and meet the budget.

    Args:
        cls: the method. config: changed in place.

    Raises:
        UserError: naming the option; before anything is loaded.
    """
    from hdscale.modeling.methods.budget import solve_budget

    settings, defaults = config.method, MethodSettings()
    has = [key for key in method_keys() if any(key == o or key.startswith(f"{o}.") for o in cls.options(settings))]
    for key in method_keys():
        value = get_option(settings, key)
        if key in ("name", "budget", "solve", *has) or value == get_option(defaults, key):
            continue
        if key in cls.fixed:
            if value != cls.fixed[key]:
                raise UserError(
                    f"method.{key}={value}: '{settings.name}' means {cls.fixed[key]} here; "
                    f"leave it out, or set method.name=hyperdecoder to choose"
                )
        else:
            known = f"it has {', '.join(has)}" if has else "it has none"
            raise UserError(f"method.{key}={value}: method '{settings.name}' as configured has no such option; {known}")
    for key, value in cls.fixed.items():
        set_option(settings, key, value)
    cls.check_values(config)
    check_packing(cls, config)
    solve_budget(cls, config)


def check_packing(cls: type[Method], config: HyperdecoderConfig) -> None:
    """Refuse `model.packing` where it cannot be.

    Raises:
        UserError: naming the reason.
    """
    if not config.model.packing:
        return
    if config.model.attention != "sdpa":
        raise UserError(
            f"model.packing=true has an attention of its own: leave out model.attention={config.model.attention}"
        )
    if cls.encoder_knows_instances(config.method):
        raise UserError(
            f"model.packing=true: method '{config.method.name}' as configured adapts the encoder for each instance, and a packed "
            "encoder has one sequence for all; use model.packing=false, or learned adapters in the encoder"
        )


def method_keys(settings: type = MethodSettings, prefix: str = "") -> list[str]:
    """The dotted keys of every option of `method.*`."""
    keys: list[str] = []
    for field in dataclasses.fields(settings):
        name = prefix + field.name
        keys += method_keys(field.type, f"{name}.") if dataclasses.is_dataclass(field.type) else [name]
    return keys


def get_option(settings: MethodSettings, key: str) -> Any:
    """The value of a dotted key of `method.*`."""
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def set_option(settings: MethodSettings, key: str, value: Any) -> None:
    """Set a dotted key of `method.*`."""
    *parents, last = key.split(".")
    for name in parents:
        settings = getattr(settings, name)
    setattr(settings, last, value)
