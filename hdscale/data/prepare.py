"""Which files of the hub a run needs: of its data, its tokenizer and its base."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import replace

from hdscale.data.hub import find_on_hub
from hdscale.data.mirror import Wanted, remote_files
from hdscale.data.settings import DataSettings
from hdscale.data.task import Task
from hdscale.errors import UserError

TOKENIZER_FILES = (
    "config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json spiece.model "
    "sentencepiece*.model vocab.*"
).split()
MODEL_FILES = ("config.json", "generation_config.json")
WEIGHT_FILES = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin")


def needs_hub(task: Task, settings: DataSettings) -> bool:
    """Whether a task's rows come from the hub: not from one's own files, a generator, or, for MRQA's sets, the shared
    task's folder."""
    # other question answering is read as tables, wherever the shared task's files are
    own_files = bool(task.files) or (task.chunked and settings.mrqa_root is not None)
    return task.repo is not None and not own_files


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


@functools.cache
def remote_files_once(repo: str, revision: str) -> dict[str, Wanted]:
    """`remote_files` of a data set, asked for once: many tasks share a repository."""
    return remote_files(repo, revision, "dataset")


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
