"""Arguments that several verbs have, and options that are declared as settings."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hdscale.errors import UserError, nearest, one_line
from hdscale.settings import Settings, choices

Options = TypeVar("Options", bound=Settings)


NUMBER = re.compile(r"-\.?\d")


class Parser(argparse.ArgumentParser):
    """Raises UserError, with the nearest option for one that does not exist, where argparse would print and exit."""

    def __init__(self, **arguments: Any) -> None:
        # `--conf` must not mean `--config` today and something else once another option is added
        super().__init__(**{**arguments, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Look at the names of all options first: a misspelt one also makes another argument missing."""
        args = sys.argv[1:] if args is None else args
        self.check_options(args)
        found, more = super().parse_known_args(args, namespace)
        if more:
            self.error(f"unrecognized arguments: {' '.join(more)}")
        return found, more

    def check_options(self, args: Sequence[str]) -> None:
        """Raise UserError for the first option that does not exist."""
        for argument in args:
            name = argument.partition("=")[0]
            is_option = len(name) > 1 and name.startswith("-") and not NUMBER.match(name)
            # what follows a verb is for its own parser
            if name == "--" or (self._subparsers is not None and not is_option):
                return
            if is_option and name not in self._option_string_actions:
                shown = [option for option in self._option_string_actions if option.startswith("--")]
                raise UserError(f"{self.place}no option {name}{nearest(name, shown)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise UserError for a value, such as a verb, that is none of those there are."""
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
            raise UserError(f"{self.place}unknown {name} {value}{nearest(value, map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{self.place}{one_line(message)} (see {self.prog} --help)")

    @property
    def place(self) -> str:
        """The verb, before what is wrong with its arguments."""
        _, _, verb = self.prog.partition(" ")
        return f"{verb}: " if verb else ""


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
