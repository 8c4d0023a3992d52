"""What is checked of a task's texts before anything is trained: labels and texts as the tokenizer gives them back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hdscale.data.task import Task
from hdscale.data.tokenize import TokenizedSplit
from hdscale.errors import UserError

ROUGE_LETTERS = re.compile(r"[a-z0-9]")
"""What ROUGE's own tokenizer reads of a text in lower case."""


def check_labels(task: Task, tokenizer: Any, length: int) -> None:
    """Raise UserError for a label that the tokenizer does not give back, or for two labels that it cannot tell apart.

    Such a label could never be predicted, or would count as another one.

    Args:
        length: most tokens of a target, `</s>` included (`data.max_target_length`).
    """
    if task.kind != "label":
        return
    seen: dict[tuple[int, ...], str] = {}
    for label in task.labels:
        ids = tokenizer(label, truncation=True, max_length=length).input_ids
        back = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if other := seen.get(tuple(ids)):
            raise UserError(
                f"task {task.name}: labels '{other}' and '{label}' are the same {len(ids)} tokens to this tokenizer; "
                "write them in other words"
            )
        seen[tuple(ids)] = label
        if back != label.strip():
            raise UserError(
                f"task {task.name}: the tokenizer gives label '{label}' back as '{back}', so it could never be right; "
                "write it in other words (labels: {value: text}), or raise data.max_target_length"
            )


def check_rouge(task: Task, targets: Iterable[str]) -> None:
    """Raise UserError if ROUGE would read nothing of most targets: its tokenizer knows Latin letters and digits only.

    Args:
        targets: some of the task's targets.
    """
    if task.rouge_tokenizer == "unicode" or not any(name.startswith("rouge") for name in task.metrics):
        return
    texts = [text for text in targets if text.strip()]
    empty = sum(not ROUGE_LETTERS.search(text.lower()) for text in texts)
    if texts and 2 * empty > len(texts):
        raise UserError(
            f"task {task.name}: ROUGE's tokenizer reads Latin letters and digits only, and finds none in {empty} of "
            f"{len(texts)} targets; add 'rouge_tokenizer: unicode' to the task's declaration"
        )


def losses_of(task: Task, split: TokenizedSplit) -> str | None:
    """What a split's rows lose as tokens, in one line; None if nothing (or not recorded)."""
    shares = [
        (split.counts.get("source_cut", 0), f"sources cut at {split.counts.get('source_length')} tokens"),
        (split.counts.get("target_cut", 0), f"targets cut at {split.counts.get('target_length')} tokens"),
        (split.counts.get("unknown", 0), "rows with characters that the tokenizer does not know"),
    ]
    found = [f"{100 * count / len(split):.1f}% {what}" for count, what in shares if count]
    return f"{task.name} {split.split}: {', '.join(found)}" if found else None
