"""`hdscale analyze NAME`: embeddings as pictures, comparisons over seeds, the paper's tables.

hdscale analyze embeddings --run runs/glue_large
hdscale analyze compare runs/a_seed1 runs/a_seed2 --against runs/b_seed1 runs/b_seed2
hdscale analyze tables --runs runs
"""

from __future__ import annotations

import argparse

from hdscale.analysis.compare import TEST_NAMES, compare_runs
from hdscale.analysis.formats import SUFFIXES, TextTable, write_tables
from hdscale.analysis.options import EmbeddingOptions
from hdscale.analysis.tables import tables_of
from hdscale.commands.arguments import add_options, read_options
from hdscale.errors import EXIT_DONE
from hdscale.runs.results import find_runs, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-verb for each analysis."""
    names = parser.add_subparsers(dest="analysis", metavar="NAME", required=True)
    for name, help_line, add, function in (
        ("embeddings", "t-SNE and PCA of what conditions the decoder (Figures 2-4)", add_embeddings, embeddings),
        ("compare", "two methods over seeds: means, deviations and tests (the marks of Table 1)", add_compare, compare),
        ("tables", "your runs beside the rows that the paper prints", add_tables, tables),
    ):
        sub = names.add_parser(name, help=help_line, description=help_line)
        add(sub)
        sub.set_defaults(run_analysis=function)


def run(args: argparse.Namespace) -> int:
    """The analysis that was named."""
    args.run_analysis(args)
    return EXIT_DONE


def add_embeddings(parser: argparse.ArgumentParser) -> None:
    # `args.run` is the function of the verb
    parser.add_argument("--run", dest="run_folder", metavar="DIR", required=True, help="folder of a finished run")
    add_options(parser, EmbeddingOptions)


def embeddings(args: argparse.Namespace) -> None:
    """Draw embeddings, and print what was written."""
    options = read_options(args, EmbeddingOptions)
    # torch, transformers and scikit-learn: the other analyses start without them
    from hdscale.analysis.embeddings import analyze_embeddings

    written, skipped = analyze_embeddings(args.run_folder, options)
    if skipped:
        print(f"without {', '.join(skipped)}: no {options.split} split")
    print(*written, sep="\n")


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs of one method, by seed")
    parser.add_argument("--against", nargs="+", required=True, metavar="RUN", help="runs of the method to compare with")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="TASK", help="also averages without each of these tasks"
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        choices=list(TEST_NAMES),
        help="default: paired-t and welch, or welch where seeds differ",
    )
    add_output_arguments(parser)


def compare(args: argparse.Namespace) -> None:
    """Print or write the comparison of two methods."""
    first, second = ([read_run(path, args.split) for path in paths] for paths in (args.runs, args.against))
    show([compare_runs(first, second, args.test, args.without)], args)


def add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", nargs="+", default=[], metavar="DIR", help="folders that contain finished runs")
    parser.add_argument(
        "--table",
        nargs="+",
        default=[],
        metavar="N",
        help="tables of the paper (1, 2, 13, ...), or `runs` for a table of your own runs only",
    )
    add_output_arguments(parser)


def tables(args: argparse.Namespace) -> None:
    """Print or write tables."""
    show(tables_of(find_runs(args.runs, args.split) if args.runs else [], args.table), args)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--split`, `--format` and `--output`, the same for every analysis that makes tables."""
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="whose scores (default: test)")
    parser.add_argument("--format", choices=list(SUFFIXES), default="markdown", help="default: markdown")
    parser.add_argument("--output", metavar="FILE", help="write to FILE in place of the screen")


def show(found: list[TextTable], args: argparse.Namespace) -> None:
    """Print tables, or the path of the file that they were written to."""
    text = write_tables(found, args.format, args.output)
    print(text if args.output is None else f"{args.output}\n", end="")
