"""`setting()`: a field of a settings class, with its default, its help and the values that it may have.

Each room declares its settings as a dataclass of such fields in its `settings.py`. The field says what may stand in it:
a `Literal` type for a choice, `at_least`, `above`, `at_most` for a number. `Settings.validate` checks both; what
concerns several fields at once a class adds in its own `validate`.
"""

import dataclasses
import math
from typing import Any, Literal, Union, get_args, get_origin

from hdscale.errors import UserError, nearest


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    without_value: str | None = None,
) -> Any:
    """A field of a settings class, or an option of a verb.

    Args:
        default: its default. Lists, dictionaries and nested settings classes are made anew for each instance.
        help: one line for `--help` and the documentation.
        at_least, above, at_most, below: bounds of a number (`None` where the field is optional is always allowed).
        metavar, without_value: of an option: what stands for its value in `--help`, and the value of the bare option.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {
        "help": help,
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "metavar": metavar,
        "without_value": without_value,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of the settings classes: checks each field by what its own declaration says."""

    def validate(self, prefix: str = "") -> None:
        """Check every field, nested settings included. A class that overrides this calls it first.

        Args:
            prefix: what stands before the fields' names in messages: `train.` of a key, `--` of an option, which is
                spelt with dashes.

        Raises:
            UserError: for the first value that its field does not allow: the key, the value, and what is allowed.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name = field.name.replace("_", "-") if prefix == "--" else field.name
            key, value = f"{prefix}{name}", getattr(self, field.name)
            if isinstance(value, Settings):
                value.validate(f"{key}.")
            elif value is not None:
                for one in value if isinstance(value, list) else [value]:
                    check_choice(key, one, choices(field.type))
                check_bounds(key, value, field.metadata.get("bounds", {}))


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values that a `Literal` type (optional, or in a list) allows; empty for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is list:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) is Union:
        return tuple(value for part in get_args(annotation) for value in choices(part))
    return ()


def check_choice(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise UserError if `allowed` has values and this is none of them."""
    if allowed and value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(map(str, allowed))}{nearest(str(value), allowed)}")


def check_bounds(key: str, value: Any, bounds: dict[str, float]) -> None:
    """Raise UserError if a number lies outside the bounds of its field, or is not a number at all (NaN)."""
    if not bounds or not isinstance(value, int | float):
        return
    kept = (
        not math.isnan(value)
        and value >= bounds.get("at_least", -math.inf)
        and value <= bounds.get("at_most", math.inf)
        and value > bounds.get("above", -math.inf)
        and value < bounds.get("below", math.inf)
    )
    if not kept:
        words = " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds.items())
        raise UserError(f"{key}={value}: must be {words}")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested dictionaries."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value  # a label map in YAML may have numbers as keys
    return flat
