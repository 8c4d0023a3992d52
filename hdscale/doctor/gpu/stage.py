"""One stage, as a process: `python -m hdscale.doctor.gpu.stage NAME WORK`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from hdscale.doctor.gpu.lines import Lines
from hdscale.doctor.gpu.stages import choose, lines_file


def main(name: str, work: Path) -> None:
    """Make the checks of a stage; what hinders all of them is a line as well."""
    (stage,) = choose(name)
    lines = Lines(lines_file(stage, work))
    examine = None
    try:
        # a stage's imports are not another's
        examine = importlib.import_module(f"hdscale.doctor.gpu.{stage.module}").examine
    except ImportError as error:
        with lines.check("imports"):
            raise error
    if examine is not None:
        examine(lines, work)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
