"""Checkpoints that any number of ranks can read: whole tensors by name, written beside and renamed into place.

checkpoints/step_00001000/
    trainable.safetensors     fp32 masters by parameter name; trainable-00001.safetensors … where one file is too small
    optimizer.safetensors     AdamW's exp_avg.<name> and exp_avg_sq.<name>; absent at step 0
    state.json                step, what the training loop keeps (data position, best score, time, tokens), versions
    manifest.json             size and SHA-256 of every file: written last, and what makes the rest a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hdscale import __version__
from hdscale.engine.deepspeed_engine import Engine, NonFiniteError
from hdscale.errors import UserError

FORMAT_VERSION = 1
FIRST_VERSION = "0.1"
"""The hdscale of checkpoints that do not name their version."""
SHARD_BYTES = 4 * 2**30
"""Most bytes of tensors that rank 0 holds at once while saving, and of one file (a single larger tensor excepted)."""

STEP_FOLDER = re.compile(r"(?:\.replaced_)?step_(\d{8,})")
WRITING, REPLACED, REMOVING = ".writing_", ".replaced_", ".removing_"


def save_checkpoint(
    engine: Engine,
    folder: str | Path,
    state: Mapping[str, Any],
    keep: int = 2,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `folder/step_XXXXXXXX` for the engine's step, then remove all but the newest `keep`. Collective.

    Tensors are gathered one at a time and written by rank 0. Nothing that exists is touched before the new checkpoint
    is whole.

    Args:
        folder: the run's `checkpoints/`.
        state: what the training loop needs to resume; plain JSON values.

    Returns:
        the checkpoint's folder.

    Raises:
        NonFiniteError: if a weight or a moment is not finite.
        UserError: if the disk is full or the folder cannot be written. Both are raised on every rank; nothing is left
            of the attempt and older checkpoints stay.
    """
    ranks = engine.ranks
    final = Path(folder) / f"step_{engine.step:08d}"
    writer = Writer(final, shard_bytes, active=ranks.is_main)
    total = 4 * sum(math.prod(shape) for shape in engine.shapes.values())
    writer.begin()
    writer.write("trainable", engine.trainable_tensors(), total)
    if engine.step:
        writer.write("optimizer", engine.optimizer_tensors(), 2 * total)
    writer.finish(
        {
            **state,
            "format": FORMAT_VERSION,
            "step": engine.step,
            "world_size": ranks.world_size,
            "threads": ranks.threads,
            "zero_stage": engine.stage,
            "hdscale": __version__,
            "torch": torch.__version__,
        }
    )
    # what rank 0 met with is raised by every rank: none may reach a collective that another does not
    failure, non_finite = ranks.broadcast_object((writer.failure, writer.non_finite))
    if failure is not None:
        kind = NonFiniteError if non_finite else UserError
        raise kind(f"step {engine.step}: {failure}; nothing was saved, and older checkpoints are untouched")
    if ranks.is_main:
        prune(Path(folder), keep)
    return final


class Writer:
    """Rank 0's side of saving. After a failure it still takes all tensors (gathering is collective) and drops them.

    Attributes:
        failure: what went wrong first, or None.
        non_finite: whether that was a value that is not finite.
    """

    def __init__(self, final: Path, shard_bytes: int, active: bool) -> None:
        self.final = final
        self.temporary = final.with_name(WRITING + final.name)
        self.shard_bytes = shard_bytes
        self.active = active
        self.failure: str | None = None
        self.non_finite = False
        self.manifest: dict[str, dict[str, Any]] = {}

    def begin(self) -> None:
        """Make an empty temporary folder."""
        self._attempt(self._make_folder)

    def write(self, part: str, tensors: Iterable[tuple[str, torch.Tensor]], total_bytes: int) -> None:
        """Write one part, in one file or in shards of bounded size."""
        shard: dict[str, torch.Tensor] = {}
        held = written = 0
        for name, tensor in tensors:
            if not self.active or self.failure:
                continue
            if not torch.isfinite(tensor).all():
                self.failure, self.non_finite = f"{name} is not finite", True
                continue
            size = tensor.numel() * tensor.element_size()
            if shard and held + size > self.shard_bytes:
                written += 1
                self._attempt(self._write_file, f"{part}-{written:05d}.safetensors", shard)
                shard, held = {}, 0
            shard[name] = tensor.contiguous()
            held += size
        if total_bytes <= self.shard_bytes and not written:
            self._attempt(self._write_file, f"{part}.safetensors", shard)
        elif shard:
            self._attempt(self._write_file, f"{part}-{written + 1:05d}.safetensors", shard)

    def finish(self, state: dict[str, Any]) -> None:
        """Write the state and the manifest, and rename the folder into place; or remove what was written."""
        self._attempt(self._seal, state)
        if self.active and self.failure:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _attempt(self, function: Callable[..., None], *args: Any) -> None:
        if not self.active or self.failure:
            return
        try:
            function(*args)
        except (OSError, SafetensorError) as error:
            self.failure = f"cannot save {self.final}: {plain_reason(error)}"

    def _make_folder(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    def _write_file(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        path = self.temporary / name
        save_file(tensors, path)
        self._record(path)

    def _seal(self, state: dict[str, Any]) -> None:
        (self.temporary / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
        self._record(self.temporary / "state.json")
        manifest = self.temporary / "manifest.json"
        manifest.write_text(json.dumps({"format": FORMAT_VERSION, "files": self.manifest}, indent=1))
        sync(manifest)
        sync(self.temporary)
        if self.final.exists():
            # the same step again (pre-empted just after a checkpoint): `newest_whole_checkpoint` knows this name too
            replaced = self.final.with_name(REPLACED + self.final.name)
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.final, replaced)
        os.rename(self.temporary, self.final)
        sync(self.final.parent)

    def _record(self, path: Path) -> None:
        sync(path)
        self.manifest[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_reason(error: Exception) -> str:
    """What the user can do about a failed write."""
    text = str(error)
    if any(sign in text for sign in ("No space left", "os error 28", "Errno 28", "quota", "os error 122", "Errno 122")):
        return "the disk is full; free some space and run the same command again"
    if "ermission denied" in text or "Read-only" in text:
        return f"no write permission ({text}); correct it and run the same command again"
    return text


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (at least one), and what interrupted saves and removals left."""
    steps = sorted(path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name))
    doomed = steps[: len(steps) - max(1, keep)]
    for path in (*doomed, *folder.glob(f"{REPLACED}*")):
        # renamed first: a half-removed checkpoint must not look like an incomplete one
        target = path.with_name(REMOVING + path.name)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(path, target)
    for prefix in (WRITING, REMOVING):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def newest_whole_checkpoint(folder: str | Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says, or None. Torn ones are named to `warn`."""
    folder = Path(folder)
    found = [(STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    candidates = [(int(match[1]), not path.name.startswith("."), path) for match, path in found if match]
    for _, _, path in sorted(candidates, reverse=True):
        fault = find_fault(path)
        if fault is None:
            return path
        warn(f"checkpoint {path} is incomplete or damaged ({fault}); trying the previous one")
    if candidates:
        warn(f"no checkpoint in {folder} is whole; starting from the beginning")
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        for name, expected in files.items():
            file = path / name
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {error}"
    return None


def load_newest_checkpoint(engine: Engine, folder: str | Path, log: Any) -> dict[str, Any] | None:
    """Bring the engine to the newest complete checkpoint of `folder`. Collective; any world size and ZeRO stage.

    Args:
        log: its `warning(text)` reports incomplete checkpoints, and another world size, number of threads or version.

    Returns:
        the state that was saved, with `step`; None where there is no checkpoint.

    Raises:
        UserError: on every rank, if the checkpoint is of another model (the differing names and shapes are given) or
            of a newer hdscale.
    """
    ranks = engine.ranks

    def choose() -> tuple[str, dict[str, Any]] | None:
        path = newest_whole_checkpoint(folder, log.warning)
        if path is None:
            return None
        state = json.loads((path / "state.json").read_text())
        if state.get("format", 0) > FORMAT_VERSION:
            raise UserError(f"checkpoint {path} was written by a newer hdscale; upgrade, or use another run.name")
        with TensorFiles(path, "trainable") as tensors:
            check_same_model(tensors.shapes(), engine.shapes, path)
        for what, now in (("world_size", ranks.world_size), ("threads", ranks.threads)):
            if state.get(what) not in (None, now):
                log.warning(
                    f"resuming with {what} {now} instead of {state[what]}: the data order is the same, "
                    "the numbers will be close but not identical"
                )
        versions = {"hdscale": __version__, "torch": torch.__version__}
        before = {"hdscale": FIRST_VERSION} | state
        for what, version in versions.items():
            if before[what] != version:
                log.warning(
                    f"made by {what} {before[what]}, resumed with {version}: the last bits of results may differ"
                )
        return str(path), state

    chosen = ranks.on_main(choose)
    if chosen is None:
        return None
    path, state = Path(chosen[0]), chosen[1]
    with TensorFiles(path, "trainable") as tensors:
        engine.load_trainables(tensors)
    with TensorFiles(path, "optimizer") as tensors:
        engine.load_optimizer(tensors, state["step"])
    # rank 0 may remove this checkpoint at its next save: not before every rank has read it
    ranks.barrier()
    return state


def check_same_model(saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise a UserError that names the parameters in which a checkpoint and the model differ."""
    differing = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    differing += [f"{name} is not in the model" for name in saved if name not in wanted]
    differing += [
        f"{name} is {list(saved[name])} in the checkpoint and {list(shape)} in the model"
        for name, shape in wanted.items()
        if name in saved and tuple(saved[name]) != tuple(shape)
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"checkpoint {path} is of another model: {'; '.join(differing[:5])}{more}; "
            "use the run's own configuration, another run.name, or --fresh"
        )


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of one part of a checkpoint, read from its file or shards one at a time."""

    def __init__(self, folder: Path, part: str) -> None:
        # the manifest, not the folder, says what belongs to the checkpoint
        names = json.loads((folder / "manifest.json").read_text())["files"]
        pattern = re.compile(rf"{part}(-\d{{5}})?\.safetensors")
        self._files = [safe_open(folder / name, framework="pt") for name in names if pattern.fullmatch(name)]
        self._where = {name: file for file in self._files for name in file.keys()}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape}, from the headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._where.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
