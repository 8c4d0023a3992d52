"""The folder of a run: what it holds, whether it may be continued, and who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from hdscale.errors import UserError
from hdscale.files import write_text
from hdscale.settings import flatten

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOG = "train.log"
RESULTS = "results.json"
SETTLED = "settled.json"
CLASSIFIER = "classifier.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
ADAPTER = "adapter"
PREDICTIONS = "predictions"
"""The names of what a run leaves in its folder."""

FREE_KEYS = (
    "run.dir",
    "run.tensorboard",
    "run.wandb",
    "train.keep_checkpoints",
    "train.checkpoint_every",
    "train.log_every",
    "data.root",
    "data.cache",
    "cluster.",
    "deepspeed",
)
"""Keys (or beginnings of keys) that may differ when a run is continued: they do not change what is computed."""


class RunFolder:
    """`runs/<name>/`.

    Attributes:
        path: the folder.
        checkpoints, best, adapter, predictions, config, results, settled: its parts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / CHECKPOINTS
        self.best = self.path / BEST
        self.adapter = self.path / ADAPTER
        self.predictions = self.path / PREDICTIONS
        self.config = self.path / CONFIG
        self.results = self.path / RESULTS
        self.settled = self.path / SETTLED
        self._lock: Any = None

    def open(self, config: dict[str, Any], defaults: dict[str, Any], fresh: bool) -> bool:
        """Make the folder ready for a run: on rank 0, before anything is loaded.

        Args:
            config: of this start, as nested dictionaries.
            defaults: of every key: a key that the folder's config.yaml (of an older version) does not have is at its
                default.
            fresh: start anew; an earlier run of the name is moved aside, never deleted.

        Returns:
            whether an earlier run is continued.

        Raises:
            UserError: if the folder cannot be written, is in use, or holds a run with another configuration.
        """
        self._make()
        self._hold()
        if fresh and self.config.exists():
            self._move_aside()
        continued = self.config.exists()
        if continued:
            self._check_same(config, defaults)
        else:
            write_text(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return continued

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path} ({error.strerror}); choose another run.dir or correct its permissions"
            ) from error

    def _hold(self) -> None:
        """Keep a second process from writing to the same run; the lock ends with this process, however it ends."""
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.path} is in use by another process; wait for it, or choose another run.name"
            ) from error
        except OSError:
            # some cluster file systems have no locks: continue without
            self._lock.close()

    def _move_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old{number}")).exists():
            number += 1
        aside.mkdir()
        for entry in list(self.path.iterdir()):
            if entry.name != ".lock":
                os.replace(entry, aside / entry.name)

    def _check_same(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        try:
            written = flatten(yaml.safe_load(self.config.read_text()) or {})
        except (OSError, yaml.YAMLError, AttributeError) as error:
            raise UserError(f"{self.config} cannot be read ({error}); use --fresh to start anew") from error
        if differing := differing_keys(written, config, defaults):
            shown = ", ".join(differing[:6]) + (f" and {len(differing) - 6} more" if len(differing) > 6 else "")
            raise UserError(
                f"{self.path} has a run with another configuration: {shown}; choose another run.name, or --fresh to "
                "start anew (the old run is moved aside)"
            )

    def has_checkpoints(self) -> bool:
        """Whether a checkpoint was saved, whole or not."""
        return any(self.checkpoints.glob("step_*"))

    def finished(self) -> dict[str, Any] | None:
        """The results of a run that is done."""
        try:
            return json.loads(self.results.read_text())
        except (OSError, json.JSONDecodeError):
            return None

    def best_folder(self, step: int) -> Path:
        """The folder of the export of a best step."""
        return self.best / f"step_{step:08d}"

    def prune_best(self, keep: set[int]) -> None:
        """Remove exports that no best score refers to any more."""
        for folder in self.best.glob("step_*"):
            if int(folder.name.removeprefix("step_")) not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def differing_keys(written: dict[str, Any], config: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """What makes this start another run than the one in the folder: "key (before -> now)".

    Args:
        written: {dotted key: value} of the folder's config.yaml; a key that it lacks is at its default.
        config, defaults: nested dictionaries.
    """
    before = flatten(defaults) | written
    now = flatten(config)
    # entries of free-form mappings (a custom task's keys) have no default: absent is None on either side
    return [
        f"{key} ({before.get(key)!r} -> {now.get(key)!r})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(FREE_KEYS)
    ]
