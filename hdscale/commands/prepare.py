"""`hdscale prepare`: everything that a run needs from the hub, into a folder for machines without internet.

The folder is a mirror in the hub's layout (`DIR/<repository>/<file>`) with `hdscale_manifest.json`: for each
file its resolved commit, size and SHA-256. A run with `data.root=DIR model.name=DIR/<model>` and
`HF_HUB_OFFLINE=1` then needs nothing else.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hdscale.bases.fingerprint import fingerprint_weights
from hdscale.commands.arguments import add_config_arguments
from hdscale.config import Config, load_config
from hdscale.data.hub import find_on_hub
from hdscale.data.mirror import Mirror, Wanted, remote_files
from hdscale.data.pickled import convert_pickled
from hdscale.data.settings import DataSettings
from hdscale.data.sources import check_splits, split_size
from hdscale.data.tasks import SPLITS, Task, expand_tasks
from hdscale.data.tokenize import load_tokenizer
from hdscale.errors import EXIT_DONE, UserError
from hdscale.files import sha256

TOKENIZER_FILES = (
    "config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json spiece.model "
    "sentencepiece*.model vocab.*"
).split()
MODEL_FILES = ("config.json", "generation_config.json")
WEIGHT_FILES = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hdscale prepare`."""
    add_config_arguments(parser)
    parser.add_argument("--to", metavar="DIR", required=True, help="folder to fill; run again to resume or to update")
    parser.add_argument("--tokenizer-only", action="store_true", help="fetch the tokenizer alone")
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
    weights = model is not None and not args.no_weights and not args.tokenizer_only
    if weights:
        wanted += weight_files(str(model), config.model.revision)
    wanted = list(dict.fromkeys(wanted))
    fetched = mirror.fetch(wanted, args.verify)
    console.print(f"{len(fetched)} of {len(wanted)} files fetched, the others were there", highlight=False)
    if weights:
        finish_weights(mirror, str(model), wanted, console)
    mirror.tidy({file.repo for file in wanted})
    if tokenizer:
        load_tokenizer(str(mirror.folder / tokenizer))
    local = replace(config.data, root=args.to)
    check_splits(from_hub, local)
    differences = check_sizes(mirror, from_hub, local, console)
    mirror.save()
    if differences and not args.any_size:
        raise UserError(
            f"{'; '.join(differences)}. Name another revision by data.revisions, or accept these data by "
            "--any-size (files are kept)"
        )
    usage = [f"data.root={args.to}"] if from_hub else []
    usage += [f"model.name={mirror.folder / model}"] if weights else []
    usage += (
        [f"model.tokenizer={mirror.folder / tokenizer}"] if tokenizer and not (weights and tokenizer == model) else []
    )
    console.print(
        f"offline: HF_HUB_OFFLINE=1 hdscale train --config {args.config} {' '.join(usage)}",
        highlight=False,
        soft_wrap=True,
    )
    return EXIT_DONE


def needs_hub(task: Task, settings: DataSettings) -> bool:
    """Whether a task's rows come from the hub: not from one's own files, a generator, or the shared task's
    folder."""
    own_files = bool(task.files) or (task.kind == "qa" and settings.mrqa_root is not None)
    return task.repo is not None and not own_files


def hub_names(config: Config) -> tuple[str | None, str | None]:
    """(model, tokenizer) by hub id; None for folders and built-in sizes, which need no fetching."""

    def hub_id(name: str | None) -> str | None:
        return name if name and "/" in name and not Path(name).exists() else None

    model = hub_id(config.model.name)
    return model, hub_id(config.model.tokenizer) if config.model.tokenizer else model


def data_files(tasks: Sequence[Task], settings: DataSettings) -> list[Wanted]:
    """The files of all splits of the tasks."""
    found: dict[str, Wanted] = {}
    online = replace(settings, root=None)
    for task in tasks:
        for origin in dict.fromkeys(origin for rule in task.splits.values() for origin in rule.origins):
            remote = find_on_hub(task, origin, online)
            known = remote_files_once(remote.repo, remote.revision)
            found |= {known[name].path: known[name] for name in remote.names}
    return list(found.values())


_KNOWN: dict[tuple[str, str], dict[str, Wanted]] = {}


def remote_files_once(repo: str, revision: str) -> dict[str, Wanted]:
    """`remote_files` of a data set, asked for once: many tasks share a repository."""
    key = (repo, revision)
    if key not in _KNOWN:
        _KNOWN[key] = remote_files(repo, revision, "dataset")
    return _KNOWN[key]


def tokenizer_files(repo: str, revision: str | None) -> list[Wanted]:
    """The files from which a tokenizer is loaded.

    Raises:
        UserError: the repository has none.
    """
    files = remote_files(repo, revision or "main", "model")
    chosen = chosen_files(files, TOKENIZER_FILES)
    if not any(file.name != "config.json" for file in chosen):
        raise UserError(f"hub model {repo} has no tokenizer; name another repository or folder by model.tokenizer")
    return chosen


def weight_files(repo: str, revision: str | None) -> list[Wanted]:
    """Configuration and weights: safetensors if the repository has them, else pickled files to be
    converted."""
    files = remote_files(repo, revision or "main", "model")
    for patterns in (WEIGHT_FILES, PICKLED_FILES):
        weights = chosen_files(files, patterns)
        if weights:
            return chosen_files(files, MODEL_FILES) + weights
    raise UserError(f"hub model {repo} has neither safetensors nor PyTorch weights; name another by model.name")


def chosen_files(files: dict[str, Wanted], patterns: Sequence[str]) -> list[Wanted]:
    """Files at the top of a repository whose names match."""
    return [file for name, file in files.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def finish_weights(mirror: Mirror, model: str, wanted: Sequence[Wanted], console: Console) -> None:
    """Convert pickled weights, once, and note the fingerprint by which exports know their base."""
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
        # only now: until the manifest knows the new files, the old ones are the whole truth
        for file in pickled:
            os.unlink(folder / file.name)
    mirror.manifest["weights"][model] = {"fingerprint": fingerprint_weights(folder)}
    mirror.save()


def check_sizes(mirror: Mirror, tasks: Sequence[Task], settings: DataSettings, console: Console) -> list[str]:
    """Count the splits, note and show the counts; returns what differs from the paper's tables."""
    differences = []
    table = Table("task", *(f"{split}" for split in SPLITS), "paper")
    for task in tasks:
        counts = {split: split_size(task, split, settings) for split in task.splits}
        mirror.manifest["splits"][task.name] = counts
        wrong = [split for split in counts if split in task.sizes and counts[split] != task.sizes[split]]
        differences += [
            f"{task.name} {split}: {counts[split]} rows, the paper's table says {task.sizes[split]}" for split in wrong
        ]
        verdict = "differs" if wrong else "as stated" if task.sizes else "not stated"
        table.add_row(task.name, *(f"{counts[split]:,}" if split in counts else "-" for split in SPLITS), verdict)
    if tasks:
        console.print(table)
    return differences
