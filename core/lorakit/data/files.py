"""Data files: finding those that a `data.path` means.  Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from glob import glob
from importlib.resources import files as resources
from pathlib import Path

from attrs import frozen

from lorakit.errors import UserError, did_you_mean, listing, near_path
from lorakit.hub.ids import DATASETS, HubId, parse_hub_id
from lorakit.protocols import Progress

SHIPPED = "lorakit:"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
KNOWN = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
TRAIN = "train"
# What the data set libraries put beside the rows.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@frozen
class DataFile:
    """A local file of rows.

    Attributes:
        path: Where it is.
        name: How messages call it.
    """

    path: Path
    name: str


def suffix_of(name: str) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`; empty if lorakit does not read such."""
    name = name.lower()
    plain = name.removesuffix(".gz")
    suffix = next((s for s in SUFFIXES if plain.endswith(s)), "")
    # Parquet compresses within; a gzipped one would have to be unpacked whole.
    return "" if suffix == ".parquet" and plain != name else suffix


def holds_rows(name: str) -> bool:
    """Whether a file of a directory or a repository, by its path in it, is one of rows."""
    parts = name.split("/")
    if any(part.startswith((".", "_")) for part in parts) or parts[-1] in NOT_ROWS:
        return False
    return suffix_of(name) != ""


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """The names that a glob matches; `*` and `?` stop at a slash, `**/` passes any number."""
    expression = _expression(pattern)
    return [name for name in names if expression.fullmatch(name)]


@lru_cache
def _expression(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*\*/?|\*|\?|\[!?\]?[^\]]*\])", pattern.removeprefix("./"))
    known = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    text = ""
    for piece in pieces:
        if piece.startswith("[") and len(piece) > 2:
            inner = re.sub(r"([\\\[&|~^])", r"\\\1", piece[1:-1])
            text += f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
        else:
            text += known.get(piece, re.escape(piece))
    try:
        return re.compile(text)
    except re.error:
        raise UserError(f"data.files: {pattern!r} is no glob") from None


def hub_data(path: str) -> HubId | None:
    """The data set on the hub that a `data.path` names, unless something here is called so."""
    hub_id = parse_hub_id(path, DATASETS)
    return None if hub_id is None or Path(path).exists() else hub_id


def find_data_files(
    path: str, progress: Progress, *, split: str = TRAIN, pattern: str = ""
) -> list[DataFile]:
    """The files a `data.path` means, local, in the order in which they are read.

    Args:
        path: A file, a directory, a glob, a hub id or `lorakit:NAME`.
        progress: Shows downloads.
        split: Of a data set on the hub.
        pattern: A glob over the paths in a directory or a data set on the hub; "" means all, or
            the split's.

    Raises:
        UserError: There is none, one is in no format lorakit reads, or the hub cannot give it.
    """
    hub_id = hub_data(path)
    if hub_id is None:
        return find_local_files(path, pattern, split=split)
    from lorakit.data.hub_files import fetch_data

    return fetch_data(hub_id, progress, split=split, pattern=pattern)


def find_local_files(path: str, pattern: str = "", *, split: str = TRAIN) -> list[DataFile]:
    """As `find_data_files`, of what is on this machine.

    Raises:
        UserError: There is none, one is in no format lorakit reads, or a split is asked for.
    """
    found = _local_files(path, pattern)
    # All of them would be read in its place, the training rows among them.
    if split != TRAIN:
        shown = path if path.isprintable() else repr(path)
        raise UserError(
            f"data.split: {split!r} is of a data set on the hub, but data.path {shown} is on this "
            "machine",
            "Leave data.split out, and name the file of that split in data.path, or a glob over "
            "its files in data.files.",
        )
    return found


def _local_files(path: str, pattern: str) -> list[DataFile]:
    if path.startswith(SHIPPED):
        return [_shipped(path)]
    # A line break in a path would tear the message apart.
    shown = path if path.isprintable() else repr(path)
    try:
        found = Path(path).expanduser()
        if found.is_dir():
            return _in_directory(found, shown, pattern)
        if found.exists():
            paths = [found]
        else:
            # A file may have brackets in its name: only a path that does not exist is a glob.
            globbed = [Path(p) for p in sorted(glob(str(found), recursive=True))]
            paths = [p for p in globbed if p.is_file() and p.name not in NOT_ROWS]
        if not paths:
            what = "no file matches" if re.search(r"[*?[]", path) else "no file"
            raise UserError(f"{what} {shown}{near_path(found)}")
    # A name too long, a home that nobody has, a null byte.
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"no file {shown}: {error}") from None
    unknown = [p for p in paths if not suffix_of(p.name)]
    if unknown:
        more = f" (and {len(unknown) - 1} more files)" if len(unknown) > 1 else ""
        raise UserError(f"{unknown[0]}{more}: expected a file ending in {KNOWN}")
    return [DataFile(p, str(p)) for p in paths]


def _in_directory(directory: Path, shown: str, pattern: str) -> list[DataFile]:
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    rows = [name for name in names if holds_rows(name)]
    chosen = matching(rows, pattern) if pattern else rows
    if not chosen:
        raise no_file_in(f"directory {shown}", rows, pattern)
    return [DataFile(directory / name, str(directory / name)) for name in chosen]


def no_file_in(place: str, rows: Sequence[str], pattern: str) -> UserError:
    """The message where a directory or a repository has nothing to read."""
    if not rows:
        return UserError(f"{place} holds no file ending in {KNOWN}")
    return UserError(
        f"{place} has no data file that matches data.files = {pattern!r}"
        f"{did_you_mean(pattern, rows)}",
        f"It has {shortened(rows)}.",
    )


def shortened(names: Sequence[str]) -> str:
    """The first few of many names."""
    rest = [f"{len(names) - 5} more"] if len(names) > 6 else []
    return listing([*(names[:5] if rest else names), *rest])


def _shipped(path: str) -> DataFile:
    folder = Path(str(resources("lorakit") / "datasets"))
    found = folder / path.removeprefix(SHIPPED)
    shipped = [p.name for p in folder.glob("*.jsonl")]
    if found.name not in shipped:
        hint = did_you_mean(found.name, shipped) or f" (there is: {listing(shipped)})"
        raise UserError(f"lorakit ships no data file {found.name!r}{hint}")
    return DataFile(found, path)


def of_section(error: UserError, section: str) -> UserError:
    """What is wrong with a `data.path`, as of another section that has such keys."""
    if section == "data":
        return error
    keys = re.compile(r"\bdata\.(path|split|files)\b")
    message, fix = (keys.sub(rf"{section}.\1", text) for text in (error.message, error.fix))
    return UserError(message, fix)


def check_data_path(path: str, pattern: str = "", split: str = TRAIN) -> None:
    """Judges a `data.path` by names alone, without opening a file or asking the hub.

    Raises:
        UserError: As `find_data_files`; a hub id is taken for one that exists.
    """
    if hub_data(path) is None:
        find_local_files(path, pattern, split=split)
