"""What the README tells people to type: every command is parsed by the real parser; the quick start, the YAML and the
Python example are run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as torchrun_arguments

from hdscale.commands import cli
from hdscale.config import load_config
from hdscale.data.sources import check_splits
from hdscale.data.tasks import expand_tasks
from tests.helpers.places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of the page's bash blocks, without comments, variables set before the command, and our own dots."""
    found = []
    for block in blocks(page, "bash"):
        for line in re.split(r"\n|\|", block):
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] not in ("export", "cd"):
                found.append(shlex.join(word for word in words if word not in ("...", "…", "key=value")))
    return found


COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_command_is_one_that_exists(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    for word in words:
        if word.startswith(("configs/", "slurm/", "ds_configs/", "hdscale/")) and "*" not in word:
            assert (ROOT / word.partition("=")[2] if "=" in word else ROOT / word).exists(), f"{word} does not exist"
    if words[0] == "hdscale":
        monkeypatch.setattr(sys, "argv", words)
        assert callable(cli.parse(words[1:]).run)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "deepspeed":
        assert words[1:3] == ["hdscale/train.py", "--config"] or "hdscale/train.py" in words
    elif words[0] == "torchrun":
        arguments = torchrun_arguments(words[1:])
        assert arguments.training_script in ("hdscale", "hdscale/train.py")
        if arguments.module:
            assert callable(cli.parse(arguments.training_script_args).run)
    else:
        assert words[0] in ("sbatch", "bash", "srun", "pip", "python", "git", "cat"), command


def test_own_task_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML of "Train on your own data" is a whole configuration, and its files, columns and splits exist."""
    (yaml,) = blocks(ROOT / "README.md", "yaml")
    path = tmp_path / "reviews.yaml"
    path.write_text(yaml)
    config = load_config(path)
    monkeypatch.chdir(ROOT)
    (task,) = expand_tasks(config.data.tasks, config.data)
    assert set(task.splits) == {"train", "validation", "test"}
    check_splits([task], config.data)


def test_python_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    assert (tmp_path / "my_adapter" / "hdscale_config.json").exists()


@pytest.mark.slow
@pytest.mark.landing
def test_quick_start_with_the_real_launcher(tmp_path: Path) -> None:
    """The command behind `make quickstart`, a few steps of it, on two ranks."""
    command = re.search(
        r"^\t\$\(BIN\)/(deepspeed .*?) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE
    )[1]
    overrides = [f"run.dir={tmp_path}", "train.max_steps=4", "eval.limit=8", "eval.test_limit=8"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*shlex.split(command), *overrides], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "quickstart" / "results.json").read_text())
    assert results["steps"] == 4 and results["provenance"]["world_size"] == 2
    assert "majority class" in done.stdout
