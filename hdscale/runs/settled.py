"""What a run's first session found out and every later one keeps: sizes and implementations that change a sum's bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdscale.errors import UserError
from hdscale.runs.ranks import RankGroup


class Settled:
    """`settled.json` of a run's folder.

    A resumed run is the same run only if what was chosen automatically is chosen once.

    Args:
        path: the file. ranks: every rank reads what rank 0 does.

    Attributes:
        values: what is kept.

    Raises:
        UserError: if the file cannot be read.
    """

    def __init__(self, path: Path, ranks: RankGroup) -> None:
        self._path, self._ranks = path, ranks
        self.values: dict[str, Any] = ranks.on_main(read, path)

    def once(self, key: str, find: Callable[[], Any]) -> Any:
        """The value kept under `key`; at the first time what `find` returns. Collective.

        `find` is called on every rank; rank 0's result is everybody's.
        """
        if key not in self.values:
            self.values[key] = self._ranks.broadcast_object(find())
            self._ranks.on_main(self._write)
        return self.values[key]

    def _write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n")
        temporary.replace(self._path)


def read(path: Path) -> dict[str, Any]:
    """The file's entries, none where there is no file."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to have its values found again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object; remove it to have its values found again")
    return values
