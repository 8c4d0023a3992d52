"""Checks `method.*` and completes it: options that follow from the method's name, and sizes that a budget asks for."""

from __future__ import annotations

from hdscale.errors import UserError
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.methods.budget import solve_budget
from hdscale.modeling.methods.interface import Method
from hdscale.modeling.methods.options import get_option, method_keys, set_option
from hdscale.modeling.settings import MethodSettings


def complete(cls: type[Method], config: HyperdecoderConfig) -> None:
    """Refuse options that a method does not have, set those that its name decides, check the rest, solve the budget.

    Args:
        cls: the method.
        config: changed in place.

    Raises:
        UserError: naming the option; before anything is loaded.
    """
    refuse_unknown_options(cls, config.method)
    for key, value in cls.fixed.items():
        set_option(config.method, key, value)
    cls.check_values(config)
    check_packing(cls, config)
    solve_budget(cls, config)


def refuse_unknown_options(cls: type[Method], settings: MethodSettings) -> None:
    """Refuse options that were changed from their defaults, but do not exist or are fixed in this method.

    Raises:
        UserError: naming the option.
    """
    defaults = MethodSettings()
    own = cls.options(settings)
    has = [key for key in method_keys() if any(key == option or key.startswith(f"{option}.") for option in own)]
    for key in method_keys():
        value = get_option(settings, key)
        if key in ("name", "budget", "solve", *has) or value == get_option(defaults, key):
            continue
        if key not in cls.fixed:
            known = f"its options are {', '.join(has)}" if has else "it has no options"
            raise UserError(f"method.{key}={value}: method '{settings.name}' as configured has no such option; {known}")
        if value != cls.fixed[key]:
            raise UserError(
                f"method.{key}={value}: method '{settings.name}' always has {cls.fixed[key]} here; "
                f"leave it out, or set method.name=hyperdecoder to choose"
            )


def check_packing(cls: type[Method], config: HyperdecoderConfig) -> None:
    """Refuse `model.packing` where it is not possible.

    Raises:
        UserError: naming the reason.
    """
    if not config.model.packing:
        return
    if config.model.attention != "sdpa":
        raise UserError(
            f"model.packing=true uses its own attention; leave out model.attention={config.model.attention}"
        )
    if cls.encoder_knows_instances(config.method):
        raise UserError(
            f"model.packing=true: method '{config.method.name}' as configured adapts the encoder for each instance, "
            "but a packed encoder has one sequence for all of them; use model.packing=false, or learned adapters in "
            "the encoder"
        )
