"""`hdscale analyze NAME`: embeddings as pictures, comparisons over seeds, the paper's tables.

hdscale analyze embeddings --run runs/glue_base
hdscale analyze compare runs/ours_seed* --against runs/adapter_seed*
hdscale analyze tables --runs runs --format latex --output tables.tex
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hdscale.analysis.compare import TEST_NAMES, choose_tests, comparison_table
from hdscale.analysis.formats import FORMS, TextTable, render_all
from hdscale.analysis.tables import tables_of
from hdscale.errors import EXIT_DONE, UserError
from hdscale.runs.results import find_runs, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    names = parser.add_subparsers(dest="analysis", metavar="NAME", required=True)
    for name, (add, run_analysis, help_line) in ANALYSES.items():
        sub = names.add_parser(name, help=help_line, description=help_line, allow_abbrev=False)
        add(sub)
        sub.set_defaults(run_analysis=run_analysis)


def run(args: argparse.Namespace) -> int:
    """The verb."""
    code: int = args.run_analysis(args)
    return code


def add_embeddings_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `embeddings`."""
    # `args.run` is the function of the verb
    parser.add_argument("--run", dest="run_folder", metavar="DIR", required=True, help="folder of a finished run")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks or mixtures; default: the run's")
    parser.add_argument(
        "--split", default="validation", choices=["train", "validation", "test"], help="default: validation"
    )
    parser.add_argument("--limit", type=int, default=500, metavar="N", help="instances of each task (default: 500)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="instances at once (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE (default: 0)")
    parser.add_argument("--output", metavar="DIR", help="default: the run's folder, analysis/embeddings")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the run's (data.root=...)")


def run_embeddings(args: argparse.Namespace) -> int:
    """`hdscale analyze embeddings`."""
    # torch, scikit-learn and matplotlib: tables and comparisons are made without them
    from hdscale.analysis.embeddings import EmbeddingOptions, embed_run

    for name in ("limit", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    options = EmbeddingOptions(
        run=args.run_folder,
        tasks=args.tasks or [],
        split=args.split,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        output=args.output,
        device=args.device,
        overrides=args.overrides,
    )
    files = embed_run(options)
    print(files.coordinates)
    if files.skipped:
        print(f"without {', '.join(files.skipped)}: no {args.split} split")
    for path in files.pictures:
        print(path)
    return EXIT_DONE


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `compare`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs of one method, by seed")
    parser.add_argument("--against", nargs="+", required=True, metavar="RUN", help="runs of the method to compare with")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="TASK", help="also averages without these tasks, one at a time"
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        choices=list(TEST_NAMES),
        help="default: paired-t and welch, or welch where seeds differ",
    )
    add_output_arguments(parser)


def run_compare(args: argparse.Namespace) -> int:
    """`hdscale analyze compare`."""
    first, second = [read_run(path) for path in args.runs], [read_run(path) for path in args.against]
    tests, note = choose_tests(first, second, args.test)
    table = comparison_table(first, second, tests, args.without)
    if note:
        table.notes.append(note)
    return write_tables([table], args.format, args.output)


def add_tables_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tables`."""
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help="folders in and below which finished runs are searched"
    )
    parser.add_argument(
        "--table",
        nargs="+",
        default=[],
        metavar="N",
        help="tables of the paper (1, 2, 13, ...), or `runs` for one of your own runs alone",
    )
    add_output_arguments(parser)


def run_tables(args: argparse.Namespace) -> int:
    """`hdscale analyze tables`."""
    runs = find_runs(args.runs) if args.runs else []
    return write_tables(tables_of(runs, args.table), args.format, args.output)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--format` and `--output`, the same for every analysis that makes tables."""
    parser.add_argument("--format", choices=FORMS, default="markdown", help="default: markdown")
    parser.add_argument("--output", metavar="FILE", help="write to this file instead of the screen")


def write_tables(tables: Sequence[TextTable], form: str, output: str | None) -> int:
    """Print the tables, or write them to a file.

    Raises:
        UserError: where the file cannot be written.
    """
    text = render_all(tables, form)
    if output is None:
        print(text, end="")
        return EXIT_DONE
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
    print(path)
    return EXIT_DONE


ANALYSES = {
    "embeddings": (
        add_embeddings_arguments,
        run_embeddings,
        "t-SNE and PCA of what conditions the decoder (Figures 2-4)",
    ),
    "compare": (
        add_compare_arguments,
        run_compare,
        "two methods over seeds: means, deviations and tests (the marks of Table 1)",
    ),
    "tables": (add_tables_arguments, run_tables, "your runs beside the rows that the paper prints"),
}
"""{name: (its arguments, what it does, help)}."""
