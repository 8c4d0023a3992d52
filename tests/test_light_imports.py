"""What a login node and a grace period run must start quickly: it imports neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.house import ROOT, read_house, room_of

HEAVY = {"torch", "transformers", "datasets", "deepspeed", "sklearn", "scipy", "matplotlib", "evaluate"}
LIGHT_ROOMS = {"cluster", "runs", "config", "errors", "requirements", "settings", "files", "launch"}
LIGHT_FILES = ["hdscale", "hdscale.commands.cli", "hdscale.commands.arguments"]


def light_files() -> list[str]:
    """Every settings file, and every file of the light rooms."""
    files = [name for name in read_house().files if room_of(name) in LIGHT_ROOMS or name.endswith(".settings")]
    return [*LIGHT_FILES, *files]


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """{file: heavy libraries that importing it adds}, from one fresh process."""
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        "    print(name, *sorted((set(sys.modules) - before) & set(sys.argv[1].split(','))))\n"
    )
    command = [sys.executable, "-c", script, ",".join(HEAVY), *light_files()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return {name: set(found) for name, *found in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.parametrize("name", light_files())
def test_imports_no_heavy_library(name: str, loaded: dict[str, set[str]]) -> None:
    assert loaded[name] == set()


def test_settings_classes_of_the_package_are_light() -> None:
    script = "import sys, hdscale; hdscale.Config(), hdscale.TrainSettings(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
