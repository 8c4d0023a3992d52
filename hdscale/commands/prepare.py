"""`hdscale prepare`: everything that a run needs from the hub, into a folder for machines without internet.

The folder is a mirror in the hub's layout (`DIR/<repository>/<file>`) with `hdscale_manifest.json`: for each
file its resolved commit, size and SHA-256. A run with `data.root=DIR model.name=DIR/<model>` and
`HF_HUB_OFFLINE=1` then needs nothing else.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hdscale.bases.fingerprint import fingerprint_weights
from hdscale.commands.arguments import add_config_arguments
from hdscale.config import Config, load_config
from hdscale.data.mirror import Mirror, Wanted
from hdscale.data.pickled import convert_pickled
from hdscale.data.prepare import data_files, needs_hub, tokenizer_files, weight_files
from hdscale.data.settings import DataSettings
from hdscale.data.sources import check_splits, split_size
from hdscale.data.tasks import SPLITS, Task, expand_tasks
from hdscale.data.tokenize import load_tokenizer
from hdscale.errors import EXIT_DONE, UserError
from hdscale.files import sha256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hdscale prepare`."""
    add_config_arguments(parser)
    parser.add_argument("--to", metavar="DIR", required=True, help="folder to fill; run again to resume or to update")
    parser.add_argument("--tokenizer-only", action="store_true", help="fetch the tokenizer only")
    parser.add_argument("--no-weights", action="store_true", help="leave the base's weights out (data and tokenizer)")
    parser.add_argument("--no-data", action="store_true", help="leave the data out (tokenizer and weights)")
    parser.add_argument(
        "--any-size", action="store_true", help="accept splits whose sizes differ from the paper's tables"
    )
    parser.add_argument("--verify", action="store_true", help="read every file that is there and compare its checksum")


def run(args: argparse.Namespace) -> int:
    """Fill the mirror, check it, and say how to use it."""
    config = load_config(args.config, args.overrides)
    console = Console()
    tasks = [] if args.tokenizer_only or args.no_data else expand_tasks(config.data.tasks, config.data)
    from_hub = [task for task in tasks if needs_hub(task, config.data)]
    if tasks_elsewhere := [task.name for task in tasks if task not in from_hub]:
        console.print(f"not on the hub, nothing to fetch: {', '.join(tasks_elsewhere)}", highlight=False)
    mirror = Mirror(args.to)
    wanted = data_files(from_hub, config.data)
    model, tokenizer = hub_names(config)
    if tokenizer:
        wanted += tokenizer_files(tokenizer, config.model.revision if tokenizer == model else None)
    weights = None if args.no_weights or args.tokenizer_only else model
    if weights:
        wanted += weight_files(weights, config.model.revision)
    wanted = list(dict.fromkeys(wanted))
    fetched = mirror.fetch(wanted, args.verify)
    console.print(f"{len(fetched)} of {len(wanted)} files fetched; the others were already there", highlight=False)
    if weights:
        finish_weights(mirror, weights, wanted, console)
    mirror.tidy({file.repo for file in wanted})
    if tokenizer:
        load_tokenizer(str(mirror.folder / tokenizer))
    local = replace(config.data, root=args.to)
    check_splits(from_hub, local)
    table, differences = sizes_table(mirror, from_hub, local)
    if from_hub:
        console.print(table)
    mirror.save()
    if differences and not args.any_size:
        raise UserError(
            f"{'; '.join(differences)}. Name another revision by data.revisions, or accept these data by "
            "--any-size (files are kept)"
        )
    usage = [f"data.root={args.to}"] if from_hub else []
    usage += [f"model.name={mirror.folder / weights}"] if weights else []
    usage += [f"model.tokenizer={mirror.folder / tokenizer}"] if tokenizer and tokenizer != weights else []
    console.print(
        f"offline: HF_HUB_OFFLINE=1 hdscale train --config {args.config} {' '.join(usage)}",
        highlight=False,
        soft_wrap=True,
    )
    return EXIT_DONE


def hub_names(config: Config) -> tuple[str | None, str | None]:
    """(model, tokenizer) by hub id; None for folders and built-in sizes, which need no fetching."""

    def hub_id(name: str | None) -> str | None:
        return name if name and "/" in name and not Path(name).exists() else None

    model = hub_id(config.model.name)
    return model, hub_id(config.model.tokenizer) if config.model.tokenizer else model


def finish_weights(mirror: Mirror, model: str, wanted: Sequence[Wanted], console: Console) -> None:
    """Convert pickled weights, once, and record the fingerprint by which exports know their base."""
    folder = mirror.folder / model
    pickled = [
        file for file in wanted if file.repo == model and file.name.endswith(".bin") and (folder / file.name).is_file()
    ]
    if pickled:
        console.print(f"converting {len(pickled)} file(s) of {model} to safetensors", highlight=False)
        written = convert_pickled(folder, [file.name for file in pickled])
        for name in written:
            mirror.record(f"{model}/{name}", sha256(folder / name), repo=model, commit=pickled[0].commit)
        for file in pickled:
            mirror.manifest["files"][file.path]["converted_to"] = written
        mirror.save()
        # only now: until the manifest has the new files, the old ones are needed
        for file in pickled:
            os.unlink(folder / file.name)
    mirror.manifest["weights"][model] = {"fingerprint": fingerprint_weights(folder)}
    mirror.save()


def sizes_table(mirror: Mirror, tasks: Sequence[Task], settings: DataSettings) -> tuple[Table, list[str]]:
    """(a table of the splits' rows, what differs from the paper's tables); the counts go into the manifest."""
    differences = []
    table = Table("task", *SPLITS, "paper")
    for task in tasks:
        counts = {split: split_size(task, split, settings) for split in task.splits}
        mirror.manifest["splits"][task.name] = counts
        wrong = [split for split in counts if split in task.sizes and counts[split] != task.sizes[split]]
        differences += [
            f"{task.name} {split}: {counts[split]} rows, the paper's table says {task.sizes[split]}" for split in wrong
        ]
        verdict = "differs" if wrong else "as stated" if task.sizes else "not stated"
        table.add_row(task.name, *(f"{counts[split]:,}" if split in counts else "-" for split in SPLITS), verdict)
    return table, differences
