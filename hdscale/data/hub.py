"""Where a hub data set's parquet files are: in a mirror of the hub's layout (`data.root`), or on the hub."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hdscale.data.settings import DataSettings
from hdscale.data.task import Task
from hdscale.errors import UserError, one_line

CONVERTED = "refs/convert/parquet"
"""The hub's own conversion of data sets whose main branch has no parquet files."""
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class RemoteFiles:
    """A split's files on the hub, at one commit."""

    repo: str
    revision: str
    commit: str
    names: tuple[str, ...]


def split_paths(task: Task, origin: str, settings: DataSettings) -> list[Path]:
    """Local paths of the parquet files of one of the data set's own splits, in order; downloaded first where
    there is no mirror.

    Raises:
        UserError: the split is not there, a shard of it is missing, or the hub cannot be reached.
    """
    if settings.root is None:
        remote = find_on_hub(task, origin, settings)
        return [download(remote, name) for name in remote.names]
    root = Path(settings.root)
    if not root.is_dir():
        raise UserError(f"data.root={settings.root} is not a folder; `hdscale prepare --config F --to DIR` fills one")
    folder = root / str(task.repo)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")) if folder.is_dir() else []
    found = match(names, task.configs, origin)
    if not found:
        wanted = folder / task.configs[0] / f"{origin}-00000-of-00001.parquet"
        raise UserError(f"{wanted} is missing: split '{origin}' of task {task.name}{have(names)}; {remedy(settings)}")
    return [folder / name for name in whole(found, str(folder))]


def find_on_hub(task: Task, origin: str, settings: DataSettings) -> RemoteFiles:
    """The files of a split on the hub: at the pinned (or configured) revision, else in the hub's parquet
    conversion."""
    repo = str(task.repo)
    configured = settings.revisions.get(repo) or settings.revision
    revisions = [configured or task.revision or "main"]
    if not configured:
        revisions.append(CONVERTED)
    seen: tuple[str, ...] = ()
    failed: list[UserError] = []
    for revision in revisions:
        try:
            commit, names = listing(repo, revision)
        except UserError as error:
            failed.append(error)
            continue
        found = match(names, task.configs, origin)
        if found:
            return RemoteFiles(repo, revision, commit, tuple(whole(found, f"hub data set {repo}@{revision}")))
        seen = seen or tuple(name for name in names if name.endswith(".parquet"))
    if len(failed) == len(revisions):
        raise failed[0]
    raise UserError(
        f"hub data set {repo}@{revisions[0]} has no parquet file of split '{origin}' in "
        f"{' or '.join(repr(folder or '.') for folder in task.configs)} (task {task.name}){have(seen)}; "
        f"name another revision by data.revisions={{{repo}: REVISION}}"
    )


@functools.lru_cache(maxsize=256)
def listing(repo: str, revision: str) -> tuple[str, tuple[str, ...]]:
    """(commit, file names) of a hub data set; of the local cache's snapshot where the hub cannot be
    reached."""
    try:
        info = repo_info(repo, revision, "dataset")
        return str(info.sha), tuple(sorted(sibling.rfilename for sibling in info.siblings or []))
    except UnreachableError as error:
        reason = error
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"hub data set {repo} is neither reachable ({reason}) nor in the local cache; run "
            "`hdscale prepare --config F --to DIR` on a machine with internet, then set data.root=DIR"
        ) from error
    return folder.name, tuple(
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    )


class UnreachableError(Exception):
    """The hub does not answer (no network, or HF_HUB_OFFLINE); the message says which."""


def repo_info(repo: str, revision: str, kind: str, sizes: bool = False) -> Any:
    """The hub's description of a repository: `sha`, `siblings` (with sizes and checksums if asked for).

    Args:
        kind: `dataset` or `model`.

    Raises:
        UserError: no such repository or revision, or no access to it.
        UnreachableError: the hub does not answer.
    """
    what = "data set" if kind == "dataset" else kind
    try:
        return huggingface_hub.HfApi().repo_info(repo, revision=revision, repo_type=kind, files_metadata=sizes)
    except GatedRepoError as error:
        raise UserError(
            f"hub {what} {repo} is gated: accept its terms on the hub and log in (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"hub {what} {repo} has no revision '{revision}'; see data.revisions and model.revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"there is no hub {what} '{repo}' (or it is private: log in by `hf auth login`)") from error
    except HFValidationError as error:
        raise UserError(f"'{repo}' is not a name of a hub {what}: {short(error)}") from error
    except OfflineModeIsEnabled as error:
        raise UnreachableError("HF_HUB_OFFLINE is set") from error
    except (HfHubHTTPError, OSError) as error:
        raise UnreachableError(short(error)) from error
    except Exception as error:  # the hub client's transport has its own hierarchy of network errors
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise UnreachableError(short(error)) from error


def download(remote: RemoteFiles, name: str) -> Path:
    """The local path of a hub file, fetched into the hub client's cache if it is not there."""
    try:
        return Path(huggingface_hub.hf_hub_download(remote.repo, name, repo_type="dataset", revision=remote.revision))
    except Exception as error:
        raise UserError(
            f"{name} of hub data set {remote.repo}@{remote.revision} cannot be fetched: {short(error)}; "
            "run `hdscale prepare --config F --to DIR` on a machine with internet, then set data.root=DIR"
        ) from error


def match(names: list[str] | tuple[str, ...], configs: tuple[str, ...], origin: str) -> list[str]:
    """Names of a split's files in the first of `configs` that has any.

    The hub has four layouts: `<config>/<split>-00000-of-00001.parquet` (an upload's hash may follow),
    `<config>/<split>/0000.parquet` and `<config>/<set>-<split>.parquet` (conversions), and
    `<config>/<split>.parquet`.
    """
    for config in configs:
        prefix = re.escape(f"{config}/" if config else "")
        exact = re.compile(rf"{prefix}{re.escape(origin)}(-\d{{5}}-of-\d{{5}}(-[0-9a-f]+)?|/\d+)?\.parquet")
        named = re.compile(rf"{prefix}[^/-]+-{re.escape(origin)}(-\d{{5}}-of-\d{{5}})?\.parquet")
        for pattern in (exact, named):
            found = sorted(name for name in names if pattern.fullmatch(name))
            if found:
                return found
    return []


def whole(names: list[str], place: str) -> list[str]:
    """The names, after a check that no shard of `-00000-of-0000N` is missing or there twice."""
    shards: dict[int, list[int]] = defaultdict(list)
    for name in names:
        numbers = SHARD.search(name)
        if numbers:
            shards[int(numbers[2])].append(int(numbers[1]))
    for total, present in shards.items():
        if sorted(present) != list(range(total)) or len(shards) > 1:
            missing = sorted(set(range(total)) - set(present))
            what = (
                f"shard {missing[0]:05d}-of-{total:05d} is missing"
                if missing
                else "shards of several uploads are mixed"
            )
            raise UserError(f"{place}: {names[0]}: {what}; fetch the split again with `hdscale prepare`")
    return names


def have(names: list[str] | tuple[str, ...]) -> str:
    """What is there instead, for an error message."""
    if not names:
        return "; there is no parquet file"
    shown = ", ".join(names[:4])
    return f"; there: {shown}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def remedy(settings: DataSettings) -> str:
    """What to do about a mirror that lacks a file."""
    return f"fill the mirror with `hdscale prepare --config F --to {settings.root}`"


def short(error: Exception) -> str:
    """An exception's message in one line of readable length."""
    return one_line(error)[:200] or type(error).__name__
