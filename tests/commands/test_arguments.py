"""What a user reads who misspells a verb, an option or one of its values: the nearest one, in one line."""

from __future__ import annotations

import sys

import pytest

from hdscale.commands import cli
from hdscale.commands import train as train_command

CASES = [
    (["trian", "--config", "x"], "unknown VERB trian; did you mean 'train'?"),
    (["--hepl"], "no option --hepl; did you mean '--help'?"),
    # a misspelt option that is required, one of a verb within a verb, one with its value behind "="
    (["train", "--confg", "x"], "train: no option --confg; did you mean '--config'?"),
    (["bench", "op", "--shap=large"], "bench op: no option --shap; did you mean '--shape'?"),
    (["bench", "stp"], "bench: unknown NAME stp; did you mean 'step'?"),
    (["evaluate", "--run", "x", "--split", "tst"], "evaluate: unknown --split tst; did you mean 'test'?"),
    # never an abbreviation
    (["train", "--conf", "x"], "train: no option --conf; did you mean '--config'?"),
    (["train"], "train: the following arguments are required: --config (see hdscale train --help)"),
    (
        ["bench", "op", "--rounds", "x"],
        "bench op: argument --rounds: invalid int value: 'x' (see hdscale bench op --help)",
    ),
    ([], "the following arguments are required: VERB (see hdscale --help)"),
]


@pytest.mark.parametrize(("argv", "line"), CASES, ids=[" ".join(argv) or "nothing" for argv, _ in CASES])
def test_one_line(capsys, argv, line):
    """Exit code 2, and nothing else. Fails if argparse answers with its usage."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err == f"hdscale: error: {line}\n" and captured.out == ""


def test_the_deepspeed_launchers_entry_answers_alike(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=0", "--config", "x", "--fesh"])
    assert train_command.main() == 2
    assert capsys.readouterr().err == "hdscale: error: no option --fesh; did you mean '--fresh'?\n"


def test_numbers_and_what_follows_a_verb_are_no_options(monkeypatch):
    """A negative value is a value; the verb's options are not looked for among those before the verb."""
    args = cli.parse(["bench", "decode", "--rows", "-3", "--turns", "2"])
    assert (args.rows, args.turns) == (-3, 2)
    args = cli.parse(["train", "--config", "x", "run.seed=1", "--fresh"])
    assert args.overrides == ["run.seed=1"] and args.fresh
