"""Runs commands (JSON on stdin) in one fresh process whose hub is the stand-in; prints what each did."""

from __future__ import annotations

import contextlib
import io
import json
import sys

from hdscale.commands.cli import main
from hdscale.config import load_config
from hdscale.data.sources import load_examples
from hdscale.data.tasks import expand_tasks
from hdscale.data.tokenize import load_tokenizer, tokenized_split
from hdscale.errors import guarded


def show_examples(overrides: list[str]) -> int:
    """Print the first training examples of the tasks, and tokens where a tokenizer is named."""
    config = load_config(overrides=overrides)
    for task in expand_tasks(config.data.tasks, config.data):
        rows = load_examples(task, "train", config.data)
        print(task.name, [(row.id, row.target) for row in rows[:3]])
        if config.model.tokenizer:
            tokenizer = load_tokenizer(config.model.tokenizer)
            print(tokenized_split(task, "train", tokenizer, config.data).row(0).input_ids[:3])
    return 0


if __name__ == "__main__":
    results = []
    for command in json.load(sys.stdin):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = guarded(show_examples, command[1:]) if command[0] == "examples" else main(command)
        results.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(results))
