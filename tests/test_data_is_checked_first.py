"""A mistake in any row that a run will read is found before a model is built, not after training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hdscale import train
from hdscale.commands.cli import main
from hdscale.files import json_line

ROWS = [{"id": str(number), "text": f"a dog {number}", "label": str(number % 2)} for number in range(8)]
TASK = {"kind": "label", "labels": ["0", "1"], "source": "{text}", "target": "{label}", "id": "id"}


def configuration(folder: Path, rows: dict[str, list[dict]], task: dict | None = None) -> list[str]:
    """A run on one task of one's own; `rows` replaces those of some splits, None leaves the split out."""
    splits = {"train": ROWS, "validation": ROWS, "test": ROWS} | rows
    files = {}
    for split, own in splits.items():
        if own is not None:
            files[split] = str(folder / f"{split}.jsonl")
            (folder / f"{split}.jsonl").write_text("".join(json_line(row) for row in own))
    tree = {
        "model": {"name": "quickstart"},
        "data": {"tasks": ["mine"], "custom": {"mine": {**TASK, **(task or {}), "files": files}}, "cache": str(folder)},
        "train": {"max_steps": 2, "global_batch_size": 4, "warmup_steps": 1, "dtype": "fp32"},
        "run": {"name": "r", "dir": str(folder / "runs"), "threads": 1},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    return ["train", "--config", str(folder / "c.yaml")]


def changed(place: int, **values: str) -> list[dict]:
    """The rows with one of them changed."""
    return [row | values if number == place else row for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"validation": None}, "task mine has no validation split"),
        ({"validation": []}, "validation.jsonl: no rows"),
        ({"validation": changed(5, text="  ")}, "validation.jsonl: line 6: column 'text' of task mine is empty"),
        ({"validation": changed(3, label="2")}, "validation.jsonl: line 4: label '2' is not a label"),
        ({"test": changed(7, label="")}, "test.jsonl: line 8: label '' is not a label"),
        ({"test": changed(1, id="0")}, "test.jsonl: line 2: id '0' of task mine is that of .* too"),
        ({"test": [*ROWS[:2], {"id": "9", "text": "x"}]}, "test.jsonl: line 3: no column 'label'"),
        ({"train": changed(2, text="")}, "train.jsonl: line 3: column 'text'"),
    ],
)
def test_a_faulty_row_of_any_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: dict, words: str
) -> None:
    monkeypatch.setattr(train, "build_model", lambda *_, **__: pytest.fail("the model was built first"))
    assert main(configuration(tmp_path, rows)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(words, error), error


def test_splits_that_the_run_does_not_read_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        """The model is built: the data passed."""

    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(train, "build_model", reached)
    command = configuration(tmp_path, {"validation": None, "test": None})
    with pytest.raises(Reached):
        main([*command, "eval.every=0", "eval.select=last", "eval.test=false"])


def test_labels_that_the_tokenizer_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"labels": {"0": "日", "1": "本"}}
    assert main(configuration(tmp_path, {}, task)) == 2
    error = capsys.readouterr().err
    assert "task mine: " in error and ("back as ''" in error or "are the same" in error)
