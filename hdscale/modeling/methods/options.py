"""The options of `method.*` by their dotted keys, such as `decoder.dim`."""

from __future__ import annotations

import dataclasses
from typing import Any

from hdscale.modeling.settings import MethodSettings


def method_keys(settings: Any = MethodSettings, prefix: str = "") -> list[str]:
    """The dotted keys of every option of `method.*`.

    Args:
        settings: a settings class.
        prefix: of the keys.
    """
    keys: list[str] = []
    for field in dataclasses.fields(settings):
        name = prefix + field.name
        keys += method_keys(field.type, f"{name}.") if dataclasses.is_dataclass(field.type) else [name]
    return keys


def get_option(settings: MethodSettings, key: str) -> Any:
    """The value of an option."""
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def set_option(settings: MethodSettings, key: str, value: Any) -> None:
    """Set an option."""
    section, _, name = key.rpartition(".")
    setattr(get_option(settings, section) if section else settings, name, value)
