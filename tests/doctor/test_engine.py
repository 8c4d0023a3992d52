"""`hdscale doctor --engine`: real ranks, and what it says of a wrong gradient."""

from __future__ import annotations

import json

import pytest

from hdscale.commands.cli import main
from hdscale.doctor import engine
from hdscale.doctor.gpu.lines import Wrong


@pytest.mark.slow
def test_a_stage_on_two_real_ranks(monkeypatch, capsys):
    monkeypatch.setattr(engine, "KINDS", {"ZeRO-2": {"stage": 2}})
    assert main(["doctor", "--engine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[:2] for line in lines] == [
        ["passed", " ZeRO-2, bf16, 2 ranks"],
        ["passed", " ZeRO-2, fp32, 2 ranks"],
    ]
    assert all("is that of plain backward passes" in line for line in lines)


class Run:
    """A run that ends with an error, or whose log has no line of the check."""

    def __init__(self, error: str | None, log: tuple[str, ...] = ()) -> None:
        self.error, self.log = error, log

    def finish(self) -> None:
        if self.error:
            raise Wrong(self.error)

    def log_lines(self, word: str) -> list[str]:
        return [line for line in self.log if word in line]


@pytest.mark.parametrize("error, said", [("the gradient is wrong", "the gradient is wrong"), (None, "says nothing")])
def test_what_fails_is_said(monkeypatch, capsys, error, said):
    """Exit code 1. Fails if a run's failure, or a log without the check, counts as passed."""
    monkeypatch.setattr(engine, "train", lambda *_, **__: Run(error))
    assert main(["doctor", "--engine", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 8 and all(line["state"] == "failed" and said in line["detail"] for line in found)


def test_what_was_not_compared_has_not_passed(monkeypatch, capsys):
    """Nor has it failed."""
    skipped = "self-check skipped: would need 90.0 GB more on each GPU"
    monkeypatch.setattr(engine, "train", lambda *_, **__: Run(None, (skipped,)))
    assert main(["doctor", "--engine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 8 and {(line["state"], line["detail"]) for line in found} == {("not possible here", skipped)}
