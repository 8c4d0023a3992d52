"""Rows to measure on: real GLUE text from a mirror, lengths drawn like GLUE's, or one fixed length."""

from __future__ import annotations

import argparse

import numpy as np

from hdscale.data.batches import Row
from hdscale.errors import UserError

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


def make_rows(args: argparse.Namespace, count: int) -> list[Row]:
    """`count` rows, mixed as a training run would mix them.

    Raises:
        UserError: for a length that cannot be read, or real text without a mirror and a tokenizer.
    """
    if args.lengths == "real":
        return real_rows(args, count)
    if args.lengths == "glue":
        return synthetic_rows(count, args.seed)
    source, _, target = args.lengths.partition("+")
    if not (source.isdigit() and target.isdigit() and int(source) > 0 and int(target) > 0):
        raise UserError(f"--lengths {args.lengths}: write glue, real, or two numbers such as 512+128")
    rng = np.random.default_rng(args.seed)
    return [random_row(rng, int(source), int(target), "fixed", index) for index in range(count)]


def real_rows(args: argparse.Namespace, count: int) -> list[Row]:
    """The first rows of the GLUE mixture of a mirror."""
    from hdscale.data.mixture import Mixture
    from hdscale.data.settings import DataSettings
    from hdscale.data.tasks import expand_tasks
    from hdscale.data.tokenize import load_tokenizer, tokenized_split

    if not args.data_root or not args.tokenizer:
        raise UserError("--lengths real needs --data-root DIR (a mirror with GLUE) and --tokenizer DIR")
    settings = DataSettings(tasks=["glue"], root=args.data_root)
    tokenizer = load_tokenizer(args.tokenizer)
    tasks = expand_tasks(settings.tasks, settings)
    return Mixture([tokenized_split(task, "train", tokenizer, settings) for task in tasks], args.seed).rows(0, count)


def synthetic_rows(count: int, seed: int) -> list[Row]:
    """Rows with GLUE's proportions of tasks and about its lengths; the tokens are random."""
    rng = np.random.default_rng(seed)
    tasks = list(GLUE_LENGTHS)
    sizes = np.array([GLUE_LENGTHS[task][0] for task in tasks], dtype=float)
    rows = []
    for index in range(count):
        task = tasks[rng.choice(len(tasks), p=sizes / sizes.sum())]
        # the mean of a log-normal is exp(mu + sigma^2 / 2)
        mean = GLUE_LENGTHS[task][1]
        length = int(np.clip(rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD), 6, 128))
        rows.append(random_row(rng, length, LABEL_TOKENS, task, index))
    return rows


def random_row(rng: np.random.Generator, source: int, target: int, task: str, index: int) -> Row:
    """A row of random tokens, both texts ended by </s>."""
    ids = rng.integers(3, VOCABULARY, source + target)
    return Row([*map(int, ids[: source - 1]), 1], [*map(int, ids[source : source + target - 1]), 1], 0, str(index), task)
