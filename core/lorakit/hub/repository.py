"""A repository of the hub: what is in it, and fetching some of that."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.atomic import write_file
from lorakit.errors import disk_size
from lorakit.hub.failures import disk_full, explain, explained
from lorakit.hub.ids import HubId
from lorakit.protocols import Progress

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Room left over for what else writes to the disk.
_SPARE_BYTES = 50_000_000
_SECONDS_TO_ANSWER = 20.0


@frozen
class Repository:
    """A repository at one commit.

    Attributes:
        id: As the user named it.
        commit: The revision's commit.
        sizes: File name -> bytes (0 where the hub does not say).
        folder: Its directory in the cache.
    """

    id: HubId
    commit: str
    sizes: Mapping[str, int]
    folder: Path

    @property
    def snapshot(self) -> Path:
        """Where its files are, once fetched."""
        return self.folder / "snapshots" / self.commit

    def fetch(self, names: Sequence[str], progress: Progress) -> Path:
        """Makes files local; asks the network only for those that are not.

        Args:
            names: Files of the repository, fetched in this order.
            progress: Counts bytes.

        Returns:
            The snapshot directory, which has them under their names.

        Raises:
            UserError: The hub refuses, is out of reach, or the disk is full.
        """
        missing = [name for name in names if not (self.snapshot / name).exists()]
        if not missing:
            return self.snapshot
        from lorakit.hub.transfer import download_file

        sizes = [self.sizes.get(name, 0) for name in missing]
        total = sum(sizes)
        with explained(self.id):
            self._check_room(sizes)
            with progress.task(f"fetching {self.id}", total or None, "bytes") as task:
                for name in missing:
                    download_file(self.id, name, self.commit, self.folder, task)
        return self.snapshot

    def _check_room(self, sizes: Sequence[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(sizes) - self._resumed(sizes)
        free = shutil.disk_usage(self.folder).free
        if needed + _SPARE_BYTES > free:
            told = f": {disk_size(needed)} to come, {disk_size(free)} free"
            raise disk_full(f"{self.id.key}: {self.id}", told)

    def _resumed(self, sizes: Sequence[int]) -> int:
        """The most bytes that files of these sizes can have here already.  Which half-done file is
        whose, the hub tells only when it is fetched; some are of other revisions, and those that
        huggingface_hub began (`<etag>.<random>.incomplete`) nobody goes on with."""
        begun = [
            file.stat().st_size
            for file in (self.folder / "blobs").glob("*.incomplete")
            if "." not in file.stem
        ]
        largest_first = zip(sorted(begun, reverse=True), sorted(sizes, reverse=True), strict=False)
        return sum(map(min, largest_first))


def open_repository(hub_id: HubId) -> Repository:
    """Finds out what a repository holds: from the cache if it was looked up before, else from
    the hub.

    A branch is looked up once.  Whoever wants its later commits names one, or removes the
    repository from the cache.

    Raises:
        UserError: There is no such repository or revision, or the hub refuses or is out of reach
            and the cache has nothing of it.
    """
    from huggingface_hub import constants

    name = f"{hub_id.kind}s--{hub_id.repo.replace('/', '--')}"
    folder = Path(constants.HF_HUB_CACHE).expanduser() / name
    commit = _known_commit(hub_id, folder)
    sizes = _known_listing(folder, commit) if commit else None
    if commit and sizes is not None:
        return Repository(hub_id, commit, sizes, folder)
    try:
        commit, sizes = _ask(hub_id)
    except Exception as error:
        # What another program downloaded has no listing of ours.
        local = _files_below(folder / "snapshots" / commit) if commit else {}
        if commit and local:
            return Repository(hub_id, commit, local, folder)
        found = explain(error, hub_id)
        if found is None:
            raise
        raise found from error
    _remember(hub_id, folder, commit, sizes)
    return Repository(hub_id, commit, sizes, folder)


def _ask(hub_id: HubId) -> tuple[str, dict[str, int]]:
    from huggingface_hub import HfApi, constants

    info: Any = HfApi(endpoint=constants.ENDPOINT).repo_info(
        hub_id.repo,
        repo_type=hub_id.kind,
        revision=hub_id.revision,
        files_metadata=True,
        timeout=_SECONDS_TO_ANSWER,
    )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return str(info.sha), sizes


def _known_commit(hub_id: HubId, folder: Path) -> str | None:
    revision = hub_id.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _listing_file(folder: Path, commit: str) -> Path:
    return folder / "lorakit" / f"{commit}.json"


def _known_listing(folder: Path, commit: str) -> dict[str, int] | None:
    try:
        sizes = json.loads(_listing_file(folder, commit).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return sizes if isinstance(sizes, dict) else None


def _remember(hub_id: HubId, folder: Path, commit: str, sizes: Mapping[str, int]) -> None:
    revision = hub_id.revision or "main"
    try:
        write_file(_listing_file(folder, commit), json.dumps(sizes, indent=1).encode())
        if revision != commit:
            write_file(folder / "refs" / revision, commit.encode())
    # A cache that cannot be written to may yet hold all that is wanted.
    except OSError:
        pass


def _files_below(snapshot: Path) -> dict[str, int]:
    if not snapshot.is_dir():
        return {}
    files = [p for p in snapshot.rglob("*") if p.is_file()]
    return {p.relative_to(snapshot).as_posix(): p.stat().st_size for p in files}
