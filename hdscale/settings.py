"""`setting()`: a dataclass field with a default and a line of help; every room declares its settings with it."""

import dataclasses
from typing import Any


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field. `help` is shown by `hdscale train --help` and in the documentation.

    Mutable defaults (lists, nested settings classes) are copied for each instance.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested dictionaries."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value  # a label map in YAML may have numbers as keys
    return flat
