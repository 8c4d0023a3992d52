"""Versions of libraries: one table, the package's metadata, what was tried, and what a user of another one reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from hdscale import requirements
from hdscale.commands import cli
from hdscale.errors import UserError
from hdscale.requirements import BOUNDS, WrongVersionError, require
from tests.helpers.places import ROOT

CONFIG = "configs/quickstart.yaml"
NEWEST = ROOT / "tests" / "last_newest_run.md"
"""What `make test-newest` has written."""


def write_metadata(folder: Path, library: str, version: str) -> None:
    """Let a library look like another version of it, for processes with `folder` on their path."""
    place = folder / f"{library}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {version}\n")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu"}
    return subprocess.run([sys.executable, *command], env=environ, cwd=ROOT, capture_output=True, text=True)


def test_the_metadata_say_what_the_table_says():
    """Fails where one of the two is changed without the other."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for library, bounds in BOUNDS.items():
        assert f"{library}{bounds}" in declared


def test_what_was_tried_is_allowed_and_what_was_not_is_not():
    """A release of transformers is allowed once `make test-newest` has passed with it. Fails for a looser bound."""
    tried = dict(re.findall(r"(\w+) (\d+(?:\.\w+)*)", NEWEST.read_text().partition("Libraries:")[2].splitlines()[0]))
    pinned = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert "failed" not in NEWEST.read_text() and set(BOUNDS) <= set(tried)
    for library, bounds in BOUNDS.items():
        for version in (tried[library], pinned[library]):
            assert Version(version).base_version in SpecifierSet(bounds)
    newest = Version(tried["transformers"])
    assert f"{newest.major}.{newest.minor + 1}" not in SpecifierSet(BOUNDS["transformers"])
    assert "6.0" not in SpecifierSet(BOUNDS["transformers"])


@pytest.mark.parametrize(
    ("library", "installed", "right"),
    [
        ("deepspeed", "0.19.3", False),
        ("deepspeed", "0.19.7", False),
        ("deepspeed", "0.19.8", True),
        ("deepspeed", "0.19.9+3f2a1c", True),
        ("deepspeed", "0.20.0", False),
        ("torch", "2.10.0", False),
        ("torch", "2.11.0a0+nv26.02", True),
        ("torch", "2.14.1+cu130", True),
        ("transformers", "5.19.0", False),
        ("transformers", "5.25.0.dev0", False),
        ("transformers", "5.40.0", False),
    ],
)
def test_bounds(monkeypatch, library, installed, right):
    monkeypatch.setattr(requirements, "version", lambda name: installed)
    require.cache_clear()
    if right:
        require(library)
    else:
        with pytest.raises(WrongVersionError) as wrong:
            require(library)
        needed = f"{library}{BOUNDS[library]}"
        assert str(wrong.value) == f"{library} {installed} is installed, hdscale needs {needed}: pip install '{needed}'"
        assert isinstance(wrong.value, ImportError) and isinstance(wrong.value, UserError)
    require.cache_clear()


def test_a_library_that_is_missing_passes(monkeypatch):
    """The import that follows says so; a login node may do without."""

    def missing(name: str) -> str:
        raise requirements.PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "version", missing)
    require.cache_clear()
    require("deepspeed")
    require.cache_clear()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_refuses_a_wrong_transformers(monkeypatch, capsys, verb):
    """One line and exit code 2, before the verb's libraries are imported."""
    monkeypatch.setattr(requirements, "version", lambda name: "5.40.0" if name == "transformers" else "2.13.0")
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    require.cache_clear()
    assert cli.main([verb]) == 2
    require.cache_clear()
    captured = capsys.readouterr()
    assert captured.err.startswith("hdscale: error: transformers 5.40.0 is installed, hdscale needs transformers>=")
    assert len(captured.err.splitlines()) == 1 and not captured.out


@pytest.mark.parametrize(
    "command", [("-m", "hdscale", "train"), ("hdscale/train.py",)], ids=["hdscale train", "train.py"]
)
def test_training_refuses_an_old_deepspeed(tmp_path, command):
    """Also as the deepspeed launcher and srun start it, and before torch is imported. Fails without the call in
    `commands/train.py`."""
    write_metadata(tmp_path, "deepspeed", "0.19.3")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run(tmp_path, *command, "--config", CONFIG)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "hdscale: error: deepspeed 0.19.3 is installed, hdscale needs deepspeed>=0.19.8,<0.20: "
        "pip install 'deepspeed>=0.19.8,<0.20'"
    ]


@pytest.mark.parametrize(
    ("library", "statement"),
    [
        ("transformers", "from hdscale import from_pretrained"),
        ("torch", "import hdscale.ops"),
        ("deepspeed", "from hdscale.engine import deepspeed_engine as e; e.Engine(None, None, {}, None, 0)"),
    ],
)
def test_the_library_raises_an_import_error(tmp_path, library, statement):
    """Fails without the calls in `bases/interface.py`, `ops/__init__.py` and the engine."""
    write_metadata(tmp_path, library, "0.1")
    done = run(tmp_path, "-c", f"try:\n    {statement}\nexcept ImportError as error:\n    print(error)")
    assert done.stdout.startswith(f"{library} 0.1 is installed, hdscale needs {library}{BOUNDS[library]}"), done.stderr


def test_settings_and_help_do_not_ask(tmp_path):
    """What runs on a login node needs none of these libraries."""
    for library in BOUNDS:
        write_metadata(tmp_path, library, "0.1")
    assert run(tmp_path, "-c", "import hdscale, hdscale.cluster.batch; hdscale.Config()").returncode == 0
    assert run(tmp_path, "-m", "hdscale", "--help").returncode == 0
