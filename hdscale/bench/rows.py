"""Rows to measure on: real GLUE text from a mirror, lengths drawn like GLUE's, or one fixed length."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hdscale.bases.sizes import BUILT_IN, TINY_SIZES, TINY_VOCABULARY
from hdscale.bench.options import RowOptions, fixed_lengths
from hdscale.data.batches import Row
from hdscale.data.mixture import Mixture
from hdscale.data.settings import DataSettings
from hdscale.data.tasks import expand_tasks
from hdscale.data.tokenize import load_tokenizer, tokenized_split
from hdscale.errors import UserError, nearest
from hdscale.evaluation.generation import task_decoding
from hdscale.evaluation.settings import EvalSettings

# task: (training rows of Table 10, mean source tokens under T5's vocabulary); measured on the real text of each task,
# except mrpc and stsb, which have the mean of the other pair tasks
GLUE_LENGTHS = {
    "cola": (8551, 17.7),
    "sst2": (66349, 21.8),
    "stsb": (5749, 58.2),
    "mrpc": (3668, 58.2),
    "qqp": (362846, 40.5),
    "mnli": (392702, 50.9),
    "qnli": (103743, 62.8),
    "rte": (2490, 78.6),
}
SPREAD = 0.45
"""Standard deviation of the logarithm of a task's source lengths in the synthetic rows."""
LABEL_TOKENS = 2
SYNTHETIC_VALIDATION = 1000
NUMBER_TOKENS = 6
"""Of STS-B's scores, such as 3.8 and its </s>; any number may be answered, so the task has no longest label."""
VOCABULARY = 32000


def check_size(size: str, option: str = "--size") -> None:
    """Raise UserError for a size that is not built in."""
    if size not in BUILT_IN:
        raise UserError(f"{option} {size}{nearest(size, BUILT_IN)}")


def make_rows(options: RowOptions, count: int, size: str | None = None) -> list[Row]:
    """`count` rows, mixed as a training run would mix them, within the vocabulary of a built-in size.

    Raises:
        UserError: for a length that cannot be read, or real text without a mirror and a tokenizer.
    """
    if options.lengths == "real":
        rows = real_mixture(options).rows(0, count)
    elif options.lengths == "glue":
        rows = synthetic_rows(count, options.seed)
    else:
        source, target = fixed_lengths(options.lengths)
        rng = np.random.default_rng(options.seed)
        rows = [random_row(rng, source, target, "fixed", index) for index in range(count)]
    return within_vocabulary(rows, size)


def within_vocabulary(rows: list[Row], size: str | None) -> list[Row]:
    """The rows with ids that a built-in size knows (the tiny ones know few)."""
    most = TINY_VOCABULARY if size in TINY_SIZES else VOCABULARY
    return [
        row._replace(input_ids=[id % most for id in row.input_ids], labels=[id % most for id in row.labels])
        for row in rows
    ]


def real_tasks(options: RowOptions) -> tuple[list[Any], Any, Any]:
    """(GLUE's tasks, the tokenizer, the data settings) of a mirror."""
    settings = DataSettings(tasks=["glue"], root=options.data_root)
    return expand_tasks(settings.tasks, settings), load_tokenizer(options.tokenizer), settings


def real_mixture(options: RowOptions) -> Mixture:
    """The GLUE mixture of a mirror."""
    tasks, tokenizer, settings = real_tasks(options)
    return Mixture([tokenized_split(task, "train", tokenizer, settings) for task in tasks], options.seed)


class EvaluationSet(NamedTuple):
    """Rows of one task, in the data's order, and how many tokens an answer has at most."""

    task: str
    rows: list[Row]
    most_tokens: int


def evaluation_sets(options: RowOptions, size: str, most_rows: int | None = None) -> list[EvaluationSet]:
    """GLUE's validation sets or their first rows; where lengths are not real, sets of similar sizes and lengths."""
    if options.lengths == "real":
        tasks, tokenizer, settings = real_tasks(options)
        sets = []
        for task in tasks:
            split = tokenized_split(task, "validation", tokenizer, settings)
            most = task_decoding(task, tokenizer, EvalSettings(), settings.max_target_length).max_new_tokens
            rows = [split.row(number) for number in range(min(most_rows or len(split), len(split)))]
            sets.append(
                EvaluationSet(task.name, within_vocabulary(rows, size), most if task.kind == "label" else NUMBER_TOKENS)
            )
        return sets
    count = most_rows or SYNTHETIC_VALIDATION
    if options.lengths != "glue":
        return [EvaluationSet("fixed", make_rows(options, count, size), fixed_lengths(options.lengths)[1])]
    rng = np.random.default_rng(options.seed)
    return [
        EvaluationSet(
            task,
            within_vocabulary(
                [random_row(rng, source_length(rng, task), LABEL_TOKENS, task, index) for index in range(count)],
                size,
            ),
            LABEL_TOKENS,
        )
        for task in GLUE_LENGTHS
    ]


def source_length(rng: np.random.Generator, task: str) -> int:
    """A length drawn like a task's."""
    # the mean of a log-normal is exp(mu + sigma^2 / 2)
    mean = GLUE_LENGTHS[task][1]
    return int(np.clip(rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD), 6, 128))


def synthetic_rows(count: int, seed: int) -> list[Row]:
    """Rows with GLUE's proportions of tasks and about its lengths; the tokens are random."""
    rng = np.random.default_rng(seed)
    tasks = list(GLUE_LENGTHS)
    sizes = np.array([GLUE_LENGTHS[task][0] for task in tasks], dtype=float)
    rows = []
    for index in range(count):
        task = tasks[rng.choice(len(tasks), p=sizes / sizes.sum())]
        rows.append(random_row(rng, source_length(rng, task), LABEL_TOKENS, task, index))
    return rows


def random_row(rng: np.random.Generator, source: int, target: int, task: str, index: int) -> Row:
    """A row of random tokens, both texts ended by </s>."""
    ids = rng.integers(3, VOCABULARY, source + target)
    return Row(
        [*map(int, ids[: source - 1]), 1], [*map(int, ids[source : source + target - 1]), 1], 0, str(index), task
    )
