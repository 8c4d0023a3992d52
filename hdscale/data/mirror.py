"""A folder that mirrors parts of the hub, and the manifest that says what is in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tqdm import tqdm

from hdscale import __version__
from hdscale.data.hub import UnreachableError, repo_info, short
from hdscale.errors import UserError
from hdscale.files import sha256, write_text

MANIFEST = "hdscale_manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Wanted:
    """A file of the hub at one commit."""

    repo: str
    kind: str
    """`dataset` or `model`."""
    revision: str
    commit: str
    name: str
    size: int
    checksum: str | None
    """SHA-256 that the hub states (of large files)."""

    @property
    def path(self) -> str:
        """Place in the mirror."""
        return f"{self.repo}/{self.name}"


class Mirror:
    """A mirror being filled. Each file is recorded as soon as it is complete, so that an interrupted run
    resumes where it stopped.

    Args:
        folder: made if it is not there.

    Raises:
        UserError: the folder cannot be written, or its manifest is of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--to {folder}: cannot be made ({error.strerror}); name a folder that you may write"
            ) from error
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"--to {folder}: no permission to write there")
        self.manifest: dict[str, Any] = {"format": FORMAT, "files": {}, "splits": {}, "weights": {}}
        path = self.folder / MANIFEST
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                if found.get("format") != FORMAT:
                    raise UserError(f"{path}: written by another version of hdscale; name a new folder")
            except (json.JSONDecodeError, AttributeError) as error:
                raise UserError(f"{path}: damaged ({error}); remove it: complete files will be found again") from error
            self.manifest |= found
        self.manifest["hdscale"] = __version__

    def save(self) -> None:
        """Write the manifest, whole or not at all."""
        write_text(self.folder / MANIFEST, json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")

    def has(self, wanted: Wanted, verify: bool) -> bool:
        """Whether the file is here, as recorded; `verify` reads it all."""
        record = self.manifest["files"].get(wanted.path)
        path = self.folder / wanted.path
        if not record or record["commit"] != wanted.commit:
            return False
        if path.is_file() and path.stat().st_size == record["size"]:
            return not verify or sha256(path) == record["sha256"]
        return bool(record.get("converted_to")) and all(
            self.is_whole(f"{wanted.repo}/{name}", verify) for name in record["converted_to"]
        )

    def is_whole(self, name: str, verify: bool) -> bool:
        """Whether a recorded file is here with its recorded size (and checksum)."""
        record, path = self.manifest["files"].get(name), self.folder / name
        if not record or not path.is_file() or path.stat().st_size != record["size"]:
            return False
        return not verify or sha256(path) == record["sha256"]

    def fetch(self, files: Iterable[Wanted], verify: bool = False) -> list[Wanted]:
        """Bring files into the mirror, with a progress bar over all bytes; returns those that were not there.

        Raises:
            UserError: too little space, a transfer that fails, or content that differs from the hub's
                checksum.
        """
        files = list(files)
        missing = [file for file in files if not self.has(file, verify)]
        needed, free = sum(file.size for file in missing), shutil.disk_usage(self.folder).free
        # pickled weights and their conversion are there together for a while
        room = needed + sum(file.size for file in missing if file.name.endswith(".bin"))
        if room > free:
            raise UserError(f"--to {self.folder}: {gigabytes(room)} are needed there, but {gigabytes(free)} are free")
        if not missing:
            return []
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("fetching", total=needed)
            for file in missing:
                progress.update(bar, description=f"{file.repo} {Path(file.name).name}")
                self.fetch_one(file, progress, bar)
        return missing

    def fetch_one(self, file: Wanted, progress: Progress, bar: TaskID) -> None:
        """Fetch a file, check it and record it."""

        class Bar(tqdm):
            """Passes the hub client's progress on to this one's bar."""

            def __init__(self, *args: Any, **options: Any) -> None:
                options.pop("name", None)
                super().__init__(*args, **{**options, "disable": True})
                progress.advance(bar, float(options.get("initial") or 0))

            def update(self, n: float | None = 1) -> bool | None:
                progress.advance(bar, n or 0)
                return None

        try:
            path = Path(
                huggingface_hub.hf_hub_download(
                    file.repo,
                    file.name,
                    repo_type=file.kind,
                    revision=file.commit,
                    local_dir=self.folder / file.repo,
                    tqdm_class=Bar,
                )
            )
        except Exception as error:
            network = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")
            if not isinstance(error, OSError) and not type(error).__module__.startswith(network):
                raise
            raise UserError(
                f"{file.name} of {file.repo}@{file.revision} cannot be fetched ({short(error)}); run the same command "
                "again: complete files are kept"
            ) from error
        found = sha256(path)
        if file.checksum and found != file.checksum:
            path.unlink()
            raise UserError(f"{file.path}: its content differs from the hub's checksum; run the same command again")
        self.record(file.path, found, repo=file.repo, revision=file.revision, commit=file.commit)

    def record(self, name: str, checksum: str, **facts: Any) -> None:
        """Record a complete file in the manifest."""
        size = (self.folder / name).stat().st_size
        self.manifest["files"][name] = {"size": size, "sha256": checksum, **facts}
        self.save()

    def tidy(self, repos: Iterable[str]) -> None:
        """Remove the hub client's notes on transfers, now that these are over."""
        for repo in repos:
            shutil.rmtree(self.folder / repo / ".cache", ignore_errors=True)


def remote_files(repo: str, revision: str, kind: str) -> dict[str, Wanted]:
    """{name: file} of everything in a hub repository at a revision.

    Raises:
        UserError: the hub cannot be reached, or has no such thing.
    """
    try:
        info = repo_info(repo, revision, kind, sizes=True)
    except UnreachableError as error:
        raise UserError(
            f"hub {kind} {repo} cannot be reached ({error}); run `hdscale prepare` where there is internet"
        ) from error
    return {
        sibling.rfilename: Wanted(
            repo=repo,
            kind=kind,
            revision=revision,
            commit=str(info.sha),
            name=sibling.rfilename,
            size=sibling.size or 0,
            checksum=sibling.lfs.sha256 if sibling.lfs else None,
        )
        for sibling in info.siblings or []
    }


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
