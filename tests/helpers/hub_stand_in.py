"""A small stand-in for the model hub: enough of its interface for the official client to list and fetch
files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

LARGE = (".parquet", ".bin", ".safetensors", ".model")
"""Stored as large files: the listing states their SHA-256."""


@dataclass
class StandIn:
    """Repositories and what was asked of them.

    Attributes:
        repos: {(`datasets` or `models`, name): {revision: {file: content}}}.
        requests: (method, path) of every request, in order.
        cut: {file: bytes} after which the connection breaks, once each.
    """

    repos: dict[tuple[str, str], dict[str, dict[str, bytes]]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Add a repository's revision; returns its commit."""
        self.repos.setdefault((kind, name), {})[revision] = files
        return self.commit(kind, name, revision)

    def commit(self, kind: str, name: str, revision: str) -> str:
        """The commit of a revision: itself, if it has the form of one, else a function of the content."""
        for known, files in self.repos[kind, name].items():
            commit = known if re.fullmatch("[0-9a-f]{40}", known) else commit_of(files)
            if revision in (known, commit):
                return commit
        raise KeyError(revision)

    def find(self, kind: str, name: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision, by branch or by commit."""
        revisions = self.repos.get((kind, name), {})
        return next(
            (files for known, files in revisions.items() if revision in (known, self.commit(kind, name, known))),
            None,
        )

    def fetched(self, name: str) -> int:
        """Requests for each file's content."""
        return sum(method == "GET" and path.endswith(name) for method, path in self.requests)

    def start(self) -> str:
        """Serve from a thread; returns the address for HF_ENDPOINT."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(self, *args))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        """Close the server."""
        self.server.shutdown()
        self.server.server_close()


def commit_of(files: dict[str, bytes]) -> str:
    """40 hexadecimal digits that change with the content."""
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: StandIn, *args) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        """Describe a file."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """Send a listing or a file."""
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        address = urlparse(self.path)
        path = unquote(address.path)
        self.hub.requests.append((self.command, path))
        listing = re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        if listing:
            kind, name, revision = listing.groups()
            return self.send_listing(kind, name, revision or "main", "blobs" in parse_qs(address.query))
        content = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path)
        if content:
            prefix, name, revision, file = content.groups()
            return self.send_file("datasets" if prefix else "models", name, revision, file, body)
        self.fail(404, "EntryNotFound")

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_listing(self, kind: str, name: str, revision: str, sizes: bool) -> None:
        if (kind, name) not in self.hub.repos:
            return self.fail(404, "RepoNotFound")
        files = self.hub.find(kind, name, revision)
        if files is None:
            return self.fail(404, "RevisionNotFound")
        siblings = []
        for file, content in sorted(files.items()):
            sibling = {"rfilename": file}
            if sizes:
                sibling["size"] = len(content)
                if file.endswith(LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        text = json.dumps({"id": name, "sha": self.hub.commit(kind, name, revision), "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def send_file(self, kind: str, name: str, revision: str, file: str, body: bool) -> None:
        files = self.hub.find(kind, name, revision)
        if files is None:
            return self.fail(404, "RevisionNotFound" if (kind, name) in self.hub.repos else "RepoNotFound")
        if file not in files:
            return self.fail(404, "EntryNotFound")
        content = files[file]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", self.hub.commit(kind, name, revision))
        digest = hashlib.sha256(content) if file.endswith(LARGE) else hashlib.sha1(content)
        self.send_header("ETag", f'"{digest.hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return None
        if file in self.hub.cut:
            self.wfile.write(content[start : start + self.hub.cut.pop(file)])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        self.wfile.write(content[start:])
        return None
