"""Data files: finding them and reading their rows.  Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.errors import UserError, did_you_mean, listing

SHIPPED = "lorakit:"
SUFFIXES = (".json", ".jsonl")


@frozen
class Row:
    """A row and where it stands: `data.jsonl, row 3 (line 3)`."""

    where: str
    values: dict[str, Any]


def find_data_file(path: str) -> Path:
    """The local file a `data.path` names.

    Raises:
        UserError: It does not exist, or its suffix names no format lorakit reads.
    """
    if path.startswith(SHIPPED):
        folder = Path(str(files("lorakit") / "datasets"))
        found = folder / path.removeprefix(SHIPPED)
        shipped = [p.name for p in folder.glob("*.jsonl")]
        if found.name not in shipped:
            hint = did_you_mean(found.name, shipped) or f" (there is: {listing(shipped)})"
            raise UserError(f"lorakit ships no data file {found.name!r}{hint}")
        return found
    # A line break in a path would tear the message apart.
    shown = path if path.isprintable() else repr(path)
    try:
        found = Path(path).expanduser()
        if not found.exists():
            folder = found.parent
            near = [p.name for p in folder.iterdir()] if folder.is_dir() else []
            raise UserError(f"no file {shown}{did_you_mean(found.name, near)}")
    # A name too long, a home that nobody has, a null byte.
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"no file {shown}: {error}") from None
    if found.is_dir():
        raise UserError(f"{shown} is a directory", "Name a file in it.")
    if found.suffix not in SUFFIXES:
        raise UserError(f"{shown}: expected a file ending in {' or '.join(SUFFIXES)}")
    return found


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a JSON file (a list of objects) or a JSONL file (an object a line).

    Raises:
        UserError: A line or the file is not JSON, a row is not an object, or there is no row.
    """
    file = find_data_file(path)
    name = path if path.startswith(SHIPPED) else str(file)
    try:
        rows = _json_lines(file, name) if file.suffix == ".jsonl" else _json_list(file, name)
        count = 0
        for row in rows:
            count += 1
            yield row
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read: {error}") from None
    if not count:
        raise UserError(f"{name}: the file holds no row")


def _json_lines(file: Path, name: str) -> Iterator[Row]:
    number = 0
    with file.open(encoding="utf-8-sig") as lines:
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            number += 1
            where = f"{name}, line {line_number}"
            yield Row(where, _object(_parse(line, where, offset=0), where))


def _json_list(file: Path, name: str) -> Iterator[Row]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    values = _parse(text, name, offset=None)
    if not isinstance(values, list):
        raise UserError(f"{name}: expected a list of objects", "One object a line is JSONL: .jsonl")
    for number, value in enumerate(values, 1):
        where = f"{name}, row {number}"
        yield Row(where, _object(value, where))


def _parse(text: str, where: str, offset: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if offset is None:
            place = f"line {error.lineno}, {place}"
        raise UserError(f"{where}: not valid JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, got {type(value).__name__}")
    return value
