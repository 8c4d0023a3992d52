"""Rows to measure on: real GLUE text from a mirror, lengths drawn like GLUE's, or one fixed length."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch

from hdscale.bases.base import BUILT_IN, TINY_SIZES, TINY_VOCABULARY
from hdscale.data.batches import Row
from hdscale.data.mixture import Mixture
from hdscale.errors import UserError, nearest

# task: (training rows of Table 10, mean source tokens under T5's vocabulary); measured on the real text of each task,
# except mrpc and stsb, for which the mean of the other pair tasks stands in
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


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        default="glue",
        help="glue (drawn like GLUE's), real (text of --data-root), or SOURCE+TARGET tokens such as 512+128",
    )
    parser.add_argument("--data-root", metavar="DIR", help="mirror with GLUE, for --lengths real")
    parser.add_argument("--tokenizer", metavar="DIR", help="T5's tokenizer, for --lengths real")
    parser.add_argument("--seed", type=int, default=0)


def check_sizes(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for an unknown `--size`, lengths that cannot be read, a device that is not there, and numbers below 1."""
    if hasattr(args, "size") and args.size not in BUILT_IN:
        raise UserError(f"--size {args.size}{nearest(args.size, BUILT_IN)}")
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.lengths == "real" and not (args.data_root and args.tokenizer):
        raise UserError("--lengths real needs --data-root DIR (a mirror with GLUE) and --tokenizer DIR")
    if args.lengths not in ("real", "glue"):
        fixed_lengths(args.lengths)
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible; use --device cpu")


def fixed_lengths(text: str) -> tuple[int, int]:
    """ "512+128" as numbers of source and target tokens."""
    source, _, target = text.partition("+")
    if not (source.isdigit() and target.isdigit() and int(source) > 0 and int(target) > 0):
        raise UserError(f"--lengths {text}: write glue, real, or two numbers such as 512+128")
    return int(source), int(target)


def make_rows(args: argparse.Namespace, count: int) -> list[Row]:
    """`count` rows, mixed as a training run would mix them, within the vocabulary of `args.size`.

    Raises:
        UserError: for a length that cannot be read, or real text without a mirror and a tokenizer.
    """
    if args.lengths == "real":
        rows = real_mixture(args).rows(0, count)
    elif args.lengths == "glue":
        rows = synthetic_rows(count, args.seed)
    else:
        source, target = fixed_lengths(args.lengths)
        rng = np.random.default_rng(args.seed)
        rows = [random_row(rng, source, target, "fixed", index) for index in range(count)]
    return within_vocabulary(rows, getattr(args, "size", None))


def within_vocabulary(rows: list[Row], size: str | None) -> list[Row]:
    """The rows with ids that a built-in size knows (the tiny ones know few)."""
    most = TINY_VOCABULARY if size in TINY_SIZES else VOCABULARY
    return [
        row._replace(input_ids=[id % most for id in row.input_ids], labels=[id % most for id in row.labels])
        for row in rows
    ]


def real_tasks(args: argparse.Namespace) -> tuple[list[Any], Any, Any]:
    """(GLUE's tasks, the tokenizer, the data settings) of a mirror."""
    from hdscale.data.settings import DataSettings
    from hdscale.data.tasks import expand_tasks
    from hdscale.data.tokenize import load_tokenizer

    settings = DataSettings(tasks=["glue"], root=args.data_root)
    return expand_tasks(settings.tasks, settings), load_tokenizer(args.tokenizer), settings


def real_mixture(args: argparse.Namespace) -> Mixture:
    """The GLUE mixture of a mirror."""
    from hdscale.data.tokenize import tokenized_split

    tasks, tokenizer, settings = real_tasks(args)
    return Mixture([tokenized_split(task, "train", tokenizer, settings) for task in tasks], args.seed)


class EvaluationSet(NamedTuple):
    """Rows of one task, in the data's order, and how many tokens an answer has at most."""

    task: str
    rows: list[Row]
    most_tokens: int


def evaluation_sets(args: argparse.Namespace, most_rows: int | None = None) -> list[EvaluationSet]:
    """GLUE's validation sets, or their first rows; with other lengths than real ones, sets of like sizes and lengths."""
    if args.lengths == "real":
        from hdscale.data.tokenize import tokenized_split
        from hdscale.evaluation.generation import task_decoding
        from hdscale.evaluation.settings import EvalSettings

        tasks, tokenizer, settings = real_tasks(args)
        sets = []
        for task in tasks:
            split = tokenized_split(task, "validation", tokenizer, settings)
            most = task_decoding(task, tokenizer, EvalSettings(), settings.max_target_length).max_new_tokens
            rows = [split.row(number) for number in range(min(most_rows or len(split), len(split)))]
            sets.append(
                EvaluationSet(
                    task.name, within_vocabulary(rows, args.size), most if task.kind == "label" else NUMBER_TOKENS
                )
            )
        return sets
    count = most_rows or SYNTHETIC_VALIDATION
    if args.lengths != "glue":
        return [EvaluationSet("fixed", make_rows(args, count), fixed_lengths(args.lengths)[1])]
    rng = np.random.default_rng(args.seed)
    return [
        EvaluationSet(
            task,
            within_vocabulary(
                [random_row(rng, source_length(rng, task), LABEL_TOKENS, task, index) for index in range(count)],
                args.size,
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
