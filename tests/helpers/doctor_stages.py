"""Stages that stand in for those of `hdscale doctor --gpu`: `python -m tests.helpers.doctor_stages NAME WORK`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from hdscale.doctor.gpu.lines import Lines, NotPossible, Wrong
from hdscale.doctor.gpu.stages import Stage, lines_file
from tests.helpers.places import ROOT

SECONDS = 60


def command(stage: Stage, work: Path) -> list[str]:
    """The process of a stand-in."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.helpers.doctor_stages import main; main()"
    return [sys.executable, "-P", "-c", code, stage.name, str(work)]


def main() -> None:
    name, work = sys.argv[1], Path(sys.argv[2])
    lines = Lines(lines_file(Stage(name, "", 0), work))
    if name == "silent":
        return
    with lines.check(f"{name}: first") as found:
        found.say("this | is seen", table=[{"size": "base", "ms_per_step": 1.25}])
    if name in ("sleeps", "crashes"):
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({SECONDS})"])
        (Path(os.environ["DOCTOR_TEST_FOLDER"]) / "child").write_text(str(child.pid))
    if name == "sleeps":
        with lines.check("the check that sleeps"):
            time.sleep(SECONDS)
    if name == "fails":
        with lines.check("what is wrong"):
            raise Wrong("3 instead of 4", ["the run's", "last lines"])
        with lines.check("what breaks"):
            raise ValueError("on\ntwo lines")
        with lines.check("what a CPU cannot"):
            raise NotPossible("no card")
    if name == "crashes":
        with lines.check("the check that crashes"):
            print("an illegal access", file=sys.stderr, flush=True)
            os.abort()
