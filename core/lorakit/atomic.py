"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Writes and flushes to the disk, so that a rename behind it never precedes the content."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    """Replaces one file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write_bytes(part, content)
        # mkstemp's mode is the owner's alone; a file made the usual way follows the umask.
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def why_not_writable(path: Path) -> str:
    """Why nothing can be written at a path, in a few words; empty if it can, as far as that is
    known before the directories on the way to it are made."""
    place = path
    try:
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not place.is_dir():
            return f"{place} is a file"
        # Tried, for permission bits say nothing where the file system refuses: /proc, read-only.
        with tempfile.TemporaryFile(dir=place):
            return ""
    except PermissionError:
        return f"{place} may not be written to"
    except FileNotFoundError:
        return f"{place} takes no files"
    except OSError as error:
        return f"{error.strerror}" if place == path else f"{place}: {error.strerror}"
    except ValueError as error:
        return str(error)


@contextmanager
def replaced_directory(place: Path) -> Iterator[Path]:
    """A fresh directory beside `place` that takes its place when the block ends well.

    An older directory at `place` is moved aside first and deleted last; an exception leaves it
    as it was.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    part.chmod(0o777 & ~_umask())
    try:
        yield part
        old = None
        if place.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
            place.rename(old / place.name)
        try:
            part.rename(place)
        except BaseException:
            if old is not None:
                (old / place.name).rename(place)
                old.rmdir()
            raise
        _sync_directory(place.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    """Makes the rename itself last; not every platform can open a directory."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
