"""Values that a run chooses once and then keeps: sizes and implementations that change the last bits of a sum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdscale.errors import UserError
from hdscale.files import write_json
from hdscale.runs.ranks import RankGroup


class Settled:
    """A JSON file of values that were chosen automatically (`settled.json` of a run, batch sizes of an evaluation).

    A resumed run gives the same results only if it does not choose again.

    Args:
        path: the file. ranks: every rank reads what rank 0 does.

    Attributes:
        values: what was chosen so far.

    Raises:
        UserError: if the file cannot be read.
    """

    def __init__(self, path: Path, ranks: RankGroup) -> None:
        self._path, self._ranks = path, ranks
        self.values: dict[str, Any] = ranks.on_main(read, path)

    def once(self, key: str, find: Callable[[], Any]) -> Any:
        """The value of `key`; the first time it is what `find` returns, and is then kept. Collective.

        `find` is called on every rank; rank 0's result counts on every rank.
        """
        if key not in self.values:
            self.values[key] = self._ranks.broadcast_object(find())
            self._ranks.on_main(self._write)
        return self.values[key]

    def _write(self) -> None:
        write_json(self._path, self.values, indent=1)


def read(path: Path) -> dict[str, Any]:
    """The file's entries, none where there is no file."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it: its values are then chosen anew") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object; remove it: its values are then chosen anew")
    return values
