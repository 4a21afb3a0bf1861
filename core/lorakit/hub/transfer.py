"""One file from the hub into its cache, going on where an earlier try stopped.

Layout of the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
(blobs/<etag>, snapshots/<commit>/<name> linking to them, refs/<revision>).  A half-done file is
blobs/<etag>.incomplete.  huggingface_hub as of 2.0 throws those away when it is interrupted;
with weights of several gigabytes a file, lorakit does not.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attrs import define

from lorakit.errors import UserError
from lorakit.hub.failures import is_connection_error
from lorakit.hub.ids import HubId
from lorakit.protocols import ProgressTask

SHA256_LENGTH = 64
ATTEMPTS = 3
"""How often a connection may break: huggingface_hub's versions differ in what they retry."""


def download_file(hub_id: HubId, name: str, commit: str, folder: Path, task: ProgressTask) -> None:
    """Puts a file into `folder`, the repository's directory in the cache.

    Args:
        hub_id: The repository.
        name: The file's path in it.
        commit: Of this state.
        folder: Holds `blobs` and `snapshots`.
        task: Advanced by bytes.

    Raises:
        UserError: What came is not what the hub says it is.
        Exception: Whatever huggingface_hub raises.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    pointer = folder / "snapshots" / commit / name
    url = hf_hub_url(
        hub_id.repo, name, repo_type=hub_id.kind, revision=commit, endpoint=constants.ENDPOINT
    )
    found = get_hf_file_metadata(url, endpoint=constants.ENDPOINT)
    if found.etag is None:
        raise UserError(
            f"{hub_id.key}: {constants.ENDPOINT} gives no ETag for {name}",
            "If HF_ENDPOINT is set, check that a hub answers there.",
        )
    if getattr(found, "xet_file_data", None) and _has_xet():
        _download_by_xet(hub_id, name, commit, task)
        return
    blob = folder / "blobs" / found.etag
    locks = folder.parent / ".locks" / folder.name
    for directory in (blob.parent, pointer.parent, locks):
        directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"{found.etag}.lock"):
        if not blob.exists():
            _download_by_http(hub_id, name, url, found, blob, task)
        if not pointer.exists():
            _link(blob, pointer)


def _download_by_http(
    hub_id: HubId, name: str, url: str, found: Any, blob: Path, task: ProgressTask
) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers()
    if urlsplit(found.location).netloc != urlsplit(url).netloc:
        # The address of a storage service is signed itself: the token is not for its eyes.
        headers.pop("authorization", None)
    partial = blob.with_name(f"{blob.name}.incomplete")
    with partial.open("ab") as file:
        if found.size is not None and file.tell() > found.size:
            file.seek(file.truncate(0))
        task.advance(file.tell())
        for attempts_left in reversed(range(ATTEMPTS)):
            try:
                http_get(
                    found.location,
                    _Counted(file, task),  # type: ignore[arg-type]
                    resume_size=file.tell(),
                    headers=headers,
                    expected_size=found.size,
                    **_silent(http_get),
                )
                break
            except Exception as error:
                if not attempts_left or not is_connection_error(error):
                    raise
    if len(blob.name) == SHA256_LENGTH and _sha256(partial) != blob.name:
        partial.unlink()
        raise UserError(
            f"{hub_id.key}: {hub_id}: {name} arrived damaged (its SHA-256 is not {blob.name})",
            "Run it again: the file is fetched anew.",
        )
    os.replace(partial, blob)


def _download_by_xet(hub_id: HubId, name: str, commit: str, task: ProgressTask) -> None:
    """By huggingface_hub itself, over the protocol of the hub's newer storage."""
    from huggingface_hub import constants, hf_hub_download

    hf_hub_download(
        hub_id.repo,
        name,
        repo_type=hub_id.kind,
        revision=commit,
        endpoint=constants.ENDPOINT,
        **_silent(hf_hub_download, task),
    )


def _has_xet() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _link(blob: Path, pointer: Path) -> None:
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    # A file system without links, or Windows without the right to make them.
    except OSError:
        # Whole or not at all: a name that is there counts as fetched.
        part = pointer.with_name(f"{pointer.name}.incomplete")
        shutil.copyfile(blob, part)
        os.replace(part, pointer)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@define
class _Counted:
    """A file that tells how much is written to it."""

    file: Any
    task: ProgressTask

    def write(self, chunk: bytes) -> int:
        self.task.advance(len(chunk))
        return int(self.file.write(chunk))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _silent(function: Any, task: ProgressTask | None = None) -> dict[str, Any]:
    """Arguments that keep a function of huggingface_hub from drawing a bar of its own, and, with
    a `task`, advance that instead.  The older versions among those supported lack them."""
    known = inspect.signature(function).parameters
    if "tqdm_class" in known:
        return {"tqdm_class": type("_TaskBar", (_Bar,), {"task": task})}
    return {"_tqdm_bar": _Bar()} if "_tqdm_bar" in known else {}


class _Bar:
    """In a tqdm's place."""

    task: ProgressTask | None = None

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, amount: float | None = 1) -> None:
        if self.task is not None and amount:
            self.task.advance(int(amount))

    def update_transfer(self, amount: float | None = 1) -> None:
        """What comes over the network, as against what is written: not counted a second time."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None
