"""A hub on loopback: the few of the hub's answers that downloads need, and a log of requests."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from attrs import define, field

LARGE = 4096
"""From this size on a file is kept in large-file storage, behind a redirect."""


@define
class Hub:
    """What the server has, what it is asked, and how it is to misbehave.

    Attributes:
        repos: `models/owner/name` -> file name -> content.
        log: `METHOD path` of each request, in order.
        tokens: The Authorization header of each request, or None.
        ranges: The Range header of each request for content that has one.
        gated: Repositories that want a token.
        cut: File name -> how many bytes to send, once, before the connection is dropped.
        damaged: Files of which other bytes arrive than were promised.
        xet: Say of large files that they are in xet storage too.
        busy: Answer everything with 503.
        address: Where the server listens.
        storage: Where large files are: the same server, but another host by name.
        cache: huggingface_hub's cache directory.
    """

    repos: dict[str, dict[str, bytes]] = field(factory=dict)
    log: list[str] = field(factory=list)
    tokens: list[str | None] = field(factory=list)
    ranges: list[str] = field(factory=list)
    gated: set[str] = field(factory=set)
    cut: dict[str, int] = field(factory=dict)
    damaged: set[str] = field(factory=set)
    xet: bool = False
    busy: bool = False
    address: str = ""
    storage: str = ""
    cache: str = ""

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """Adds a repository; returns its commit."""
        self.repos[repo] = files
        return self.commit(repo)

    def add_directory(self, repo: str, directory: Path) -> str:
        return self.add(repo, {p.name: p.read_bytes() for p in directory.iterdir()})

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def fetched(self) -> list[str]:
        """The files whose content was sent, each once."""
        sent = [line.split("/resolve/", 1)[1] for line in self.log if line.startswith("GET")
                and "/resolve/" in line]  # fmt: skip
        return sorted({path.partition("/")[2] for path in sent})


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str, message: str) -> None:
            self.answer(status, b"", X_Error_Code=code, X_Error_Message=message)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0]).lstrip("/")
            if path.startswith("api/") and not path.startswith(("api/models/", "api/datasets/")):
                # huggingface_hub's own questions, which are none of ours.
                self.answer(404)
                return
            hub.log.append(f"{self.command} {path}")
            hub.tokens.append(self.headers.get("Authorization"))
            if hub.busy:
                self.answer(503)
            elif path.startswith("api/"):
                repo, _, revision = path.removeprefix("api/").partition("/revision/")
                if self.admitted(repo, revision or "main"):
                    self.listing(repo)
            elif path.startswith("storage/"):
                _, repo_id, name = path.split("|")
                self.content(name, hub.repos[repo_id][name], {})
            else:
                repo, _, rest = path.partition("/resolve/")
                repo = repo if repo.startswith("datasets/") else f"models/{repo}"
                revision, _, name = rest.partition("/")
                if self.admitted(repo, revision):
                    self.resolve(repo, name)

        def admitted(self, repo: str, revision: str) -> bool:
            if repo not in hub.repos:
                self.refuse(401, "RepoNotFound", "Repository not found")
            elif repo in hub.gated and self.headers.get("Authorization") != "Bearer hf_good":
                status = 403 if self.headers.get("Authorization") else 401
                self.refuse(status, "GatedRepo", f"Access to {repo} is restricted.")
            elif revision not in ("main", "v1", hub.commit(repo)):
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return True
            return False

        def listing(self, repo: str) -> None:
            siblings = [{"rfilename": n, "size": len(c)} for n, c in hub.repos[repo].items()]
            value = {
                "id": repo.partition("/")[2],
                "sha": hub.commit(repo),
                "private": False,
                "tags": [],
                "downloads": 0,
                "siblings": siblings,
            }
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def resolve(self, repo: str, name: str) -> None:
            content = hub.repos[repo].get(name)
            commit = {"X_Repo_Commit": hub.commit(repo)}
            if content is None:
                self.answer(404, X_Error_Code="EntryNotFound", **commit)
            elif len(content) < LARGE:
                etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.content(name, content, {**commit, "ETag": f'"{etag}"'})
            elif self.command == "HEAD":
                if hub.xet:
                    commit["X_Xet_Hash"] = "0" * 64
                    commit["X_Xet_Refresh_Route"] = f"{hub.address}/api/xet"
                self.answer(
                    302,
                    Location=f"{hub.storage}/storage/|{repo}|{name}",
                    X_Linked_ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                    X_Linked_Size=str(len(content)),
                    **commit,
                )
            else:
                self.content(name, content, commit)

        def content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
            if name in hub.damaged:
                content = bytes(len(content))
            wanted = self.headers.get("Range")
            status, whole = 200, len(content)
            if wanted and self.command == "GET":
                hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                headers = {**headers, "Content_Range": f"bytes {start}-{whole - 1}/{whole}"}
                status, content = 206, content[start:]
            if self.command == "GET" and name in hub.cut:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: hub.cut.pop(name)])
                self.close_connection = True
            else:
                self.answer(status, content, Accept_Ranges="bytes", **headers)

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to, with an empty cache.  Nothing else can be reached."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    hub.storage = f"http://localhost:{server.server_port}"
    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    for scheme in ("http", "https", "all"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme.upper()}_PROXY", raising=False)
    # For processes of the test's own, and, since it reads them but once, for this one.
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    hub.cache = str(tmp_path / "hf" / "hub")
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    # Ten megabytes by default: so much is lost when a connection breaks.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", hub.cache)
    harnesses = str(tmp_path / "hf" / "harnesses.json")
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", harnesses, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`offline()` is `HF_HUB_OFFLINE=1` from there on."""

    def offline() -> None:
        from huggingface_hub import constants

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return offline
