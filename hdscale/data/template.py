"""Templates: texts with column names in braces, filled from a row."""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping
from typing import Any

from hdscale.errors import UserError, nearest


@functools.lru_cache(maxsize=1024)
def parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, column path that follows it or None) along a template.

    Raises:
        UserError: unbalanced braces, or anything but a column name between them.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"template '{template}': {error}; write column names in braces, literal braces twice"
        ) from error
    if any(name is not None and (not name or spec or how or "[" in name) for _, name, spec, how in parsed):
        raise UserError(f"template '{template}': braces may contain only plain column names, such as {{question}}")
    return tuple((literal, name) for literal, name, _, _ in parsed)


def fields(template: str) -> tuple[str, ...]:
    """Column paths that a template names in braces, in order."""
    return tuple(name for _, name in parts(template) if name is not None)


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each column's text in its place (texts are inserted as they are, braces and all)."""
    return "".join(literal + ("" if name is None else values[name]) for literal, name in parts(template))


def lookup(row: Mapping[str, Any], path: str, where: str) -> Any:
    """The value of a column; `answers.text` looks inside a column whose value is a mapping."""
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = value if isinstance(value, Mapping) else row
            raise UserError(f"{where}: no column '{path}'{nearest(part, known)}")
        value = value[part]
    return value


def cell_text(row: Mapping[str, Any], path: str, where: str) -> str:
    """A cell as text: a missing value is the empty text, lists and mappings are refused."""
    value = lookup(row, path, where)
    if value is None or value != value:  # pandas writes a missing text as NaN
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    raise UserError(f"{where}: column '{path}' has a {type(value).__name__}, not a text")
