"""`hdscale analyze NAME`: one table of analyses, each a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse

from hdscale.analysis import compare, embeddings, tables

# the modules import torch and matplotlib only where they run
ANALYSES = {
    "embeddings": (embeddings, "t-SNE and PCA of what conditions the decoder (Figures 2-4)"),
    "compare": (compare, "two methods over seeds: means, deviations and tests (the marks of Table 1)"),
    "tables": (tables, "your runs beside the rows that the paper prints"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="analysis", metavar="NAME", required=True)
    for name, (module, help_line) in ANALYSES.items():
        sub = names.add_parser(name, help=help_line, description=help_line, allow_abbrev=False)
        module.add_arguments(sub)
        sub.set_defaults(run_analysis=module.run)


def run(args: argparse.Namespace) -> int:
    return args.run_analysis(args)
