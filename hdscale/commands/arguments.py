"""Arguments that several verbs have, and options that are declared as settings."""

from __future__ import annotations

import argparse
import dataclasses
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hdscale.settings import Settings, choices

Options = TypeVar("Options", bound=Settings)


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--config FILE [key=value ...]`, the same for every verb that reads a configuration."""
    parser.add_argument("--config", metavar="FILE", required=required, help="YAML file (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def add_options(parser: argparse.ArgumentParser, options: type[Settings]) -> None:
    """One `--option` for each field of a settings class; a field `overrides` is the positional `key=value ...`."""
    kinds = get_type_hints(options)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        help, metavar = field.metadata["help"], field.metadata["metavar"]
        kind, many = plain_type(kinds[field.name])
        if field.name == "overrides":
            parser.add_argument("overrides", nargs="*", metavar=metavar, help=help)
            continue
        name = "--" + field.name.replace("_", "-")
        more: dict[str, Any] = {}
        if kind is bool:
            parser.add_argument(name, action="store_true", default=None, help=help)
            continue
        if many:
            more = {"nargs": "+", "action": "extend"}
        elif field.metadata["without_value"] is not None:
            more = {"nargs": "?", "const": field.metadata["without_value"]}
        default = default_of(field)
        text = f"{help} (default: {default})" if default not in (None, "") and "default" not in help else help
        if allowed := choices(kind):
            # checked by `read_options`, which answers with the nearest of them
            kind, metavar = str, "{" + ",".join(map(str, allowed)) + "}"
        metavar = metavar or {int: "N", float: "X"}.get(kind)
        parser.add_argument(name, type=kind, metavar=metavar, help=text.replace("%", "%%"), **more)


def read_options(args: argparse.Namespace, options: type[Options]) -> Options:
    """The options that were given, the others at their defaults; checked.

    Raises:
        UserError: for the first value that its field does not allow.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    found = options(**{name: value for name, value in given.items() if value is not None})
    found.validate("--")
    return found


def plain_type(annotation: Any) -> tuple[Any, bool]:
    """(type of one value, whether it is a list): `Optional[int]` is (int, False), `list[str]` is (str, True)."""
    if get_origin(annotation) in (Union, types.UnionType):
        [annotation] = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is list:
        return get_args(annotation)[0], True
    return annotation, False


def default_of(field: dataclasses.Field[Any]) -> str | None:
    """A field's default as `--help` shows it."""
    value = field.default_factory() if callable(field.default_factory) else field.default
    return " ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)
