"""The eight GLUE tasks: T5's text format, the paper's splits (3.1.1) or GLUE's own dev sets (Table 2)."""

from __future__ import annotations

from dataclasses import replace

from hdscale.data.settings import DataSettings
from hdscale.data.task import SplitRule, Task
from hdscale.data.tasks.sizes import TABLE_10
from hdscale.errors import UserError, nearest

REPO = "nyu-mll/glue"
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"

MIXTURES = {"glue": ("cola", "sst2", "stsb", "mrpc", "qqp", "mnli", "qnli", "rte")}

ONE = "{name} sentence: {{sentence}}"
PAIR = "{name} sentence1: {{sentence1}} sentence2: {{sentence2}}"
BINARY, NLI = ("0", "1"), ("0", "1", "2")

HALVED = {
    "train": SplitRule(("train",)),
    "validation": SplitRule(("validation",), "first_half"),
    "test": SplitRule(("validation",), "second_half"),
}
"""Small sets: the official validation set serves both."""
CARVED = {
    "train": SplitRule(("train",), "remainder"),
    "validation": SplitRule(("train",), "held_out"),
    "test": SplitRule(("validation",)),
}
"""Large sets: 1,000 training rows validate, the official validation set tests."""
DEV = {
    "train": SplitRule(("train",)),
    "validation": SplitRule(("validation",)),
    "test": SplitRule(("validation",)),
}
"""Table 2: GLUE's own dev sets select and score."""


def tasks(settings: DataSettings) -> list[Task]:
    """The declarations, with the splits that `data.glue_protocol` and `data.mnli_test` choose."""
    declared = [
        glue("cola", ONE, HALVED, ("matthews",)),
        glue("sst2", ONE, CARVED, ("accuracy",)),
        replace(
            glue("stsb", PAIR, HALVED, ("pearson", "spearman"), labels=()),
            kind="number",
            step=settings.stsb_step,
            bounds=(0.0, 5.0),
        ),
        glue("mrpc", PAIR, HALVED, ("accuracy", "f1")),
        replace(
            glue("qqp", "{name} question1: {{question1}} question2: {{question2}}", CARVED, ("accuracy", "f1")),
            # the official files have a few pairs with one question missing; Table 10 counts them
            may_be_empty=("question1", "question2"),
        ),
        glue(
            "mnli",
            "{name} premise: {{premise}} hypothesis: {{hypothesis}}",
            mnli_splits(settings.mnli_test),
            ("accuracy",),
            labels=NLI,
        ),
        glue("qnli", "{name} question: {{question}} sentence: {{sentence}}", CARVED, ("accuracy",)),
        glue("rte", PAIR, HALVED, ("accuracy",)),
    ]
    if settings.mnli_test == "mismatched":
        validation, test = TABLE_10["mnli"]["test"], TABLE_10["mnli"]["validation"]
        declared = [
            replace(task, sizes={**task.sizes, "validation": validation, "test": test}) if task.name == "mnli" else task
            for task in declared
        ]
    return [dev(task, settings.mnli_test) for task in declared] if settings.glue_protocol == "dev" else declared


def glue(
    name: str,
    source: str,
    splits: dict[str, SplitRule],
    metrics: tuple[str, ...],
    labels: tuple[str, ...] = BINARY,
) -> Task:
    """One label task of GLUE; its label is the target as the data set gives it."""
    return Task(
        name=name,
        kind="label",
        splits=splits,
        source=source.format(name=name),
        target="{label}",
        metrics=metrics,
        labels=labels,
        repo=REPO,
        configs=(name,),
        revision=REVISION,
        sizes=TABLE_10[name],
    )


def mnli_splits(test: str) -> dict[str, SplitRule]:
    """MNLI validates on one of its dev sets and tests on the other."""
    other = {"matched": "mismatched", "mismatched": "matched"}
    if test not in other:
        raise UserError(f"data.mnli_test={test}{nearest(str(test), other)}")
    return {
        "train": SplitRule(("train",)),
        "validation": SplitRule((f"validation_{other[test]}",)),
        "test": SplitRule((f"validation_{test}",)),
    }


def dev(task: Task, mnli_test: str) -> Task:
    """The task under Table 2's protocol: whole training set, the official dev set validates and tests."""
    splits = DEV
    if task.name == "mnli":
        own = SplitRule((f"validation_{mnli_test}",))
        splits = {"train": DEV["train"], "validation": own, "test": own}
    return replace(task, splits=splits, sizes={})
