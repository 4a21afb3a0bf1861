"""Reading the rows of data files, one at a time.  Torch-free."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from attrs import evolve, frozen

from lorakit.data.files import DataFile, suffix_of

PARQUET_BATCH = 1024
# The csv module refuses longer fields; documents have them.
LONGEST_FIELD = 2**31 - 1
LIST_EXPECTED = "expected is [{...}, ...], or an object a line"
DELIMITERS = (";", "\t")
"""Of tables that are called .csv all the same: spreadsheets write the first where the comma is the
decimal point."""


@frozen
class Row:
    """A row and where it stands.

    Attributes:
        where: `data.jsonl, line 3`.
        values: By key.
        doubt: What may be wrong with the file, if the row turns out to be none; or empty.
    """

    where: str
    values: dict[str, Any]
    doubt: str = ""


@frozen
class Problem:
    """Something that is no row.

    Attributes:
        message: Where and what.
        fix: A sentence, or empty.
    """

    message: str
    fix: str = ""


class _Unreadable(Exception):
    """What stops a file: nothing behind it can be read."""


def read_rows(files: Iterable[DataFile]) -> Iterator[Row | Problem]:
    """The rows of all files, in order, each with its place.

    A row that cannot be read is a `Problem` in its place, and so is the end of a file that goes
    no further; reading goes on behind it, so that a caller can tell several at once.
    """
    for file in files:
        count = 0
        try:
            for row in _READERS[suffix_of(file.path.name)](file):
                count += 1
                yield row
        except _Unreadable as error:
            yield Problem(f"{file.name}: {error}")
            continue
        except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            yield Problem(f"{file.name}: cannot be read: {error}")
            continue
        if not count:
            yield Problem(f"{file.name}: the file holds no row")


def _open(path: Path, newline: str | None = None) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _json_lines(file: DataFile) -> Iterator[Row | Problem]:
    with _open(file.path) as lines:
        yield from _lines(lines, file.name)


def _lines(lines: Iterable[str], name: str) -> Iterator[Row | Problem]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                yield _row(_parse(line, one_line=True), where)
            except _Unreadable as error:
                yield Problem(f"{where}: {error}")


def _json(file: DataFile) -> Iterator[Row | Problem]:
    """A list of objects; or, as many a .json on the hub, an object a line."""
    with _open(file.path) as opened:
        text = opened.read()
    start = text.lstrip()
    if not start:
        return
    first, _, rest = start.partition("\n")
    if start.startswith("{") and _is_object(first):
        # A sole object may be a row, or what somebody has wrapped the rows in.
        doubt = "" if rest.strip() else f"The file holds one object: {LIST_EXPECTED}."
        for row in _lines(io.StringIO(text), file.name):
            yield evolve(row, doubt=doubt) if isinstance(row, Row) else row
        return
    values = _parse(text, one_line=False)
    if not isinstance(values, list):
        raise _Unreadable(
            f"expected a list of objects, got {type(values).__name__}: {LIST_EXPECTED}"
        )
    for number, value in enumerate(values, 1):
        yield _row(value, f"{file.name}, row {number}")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: str, *, one_line: bool) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as found:
        # The decoder passes over the line break before it misses what should stand there.
        end = len(text.rstrip(" \t\r\n"))
        error = json.JSONDecodeError(found.msg, text, min(found.pos, end))
        place = f"column {error.colno}"
        if not one_line:
            place = f"line {error.lineno}, {place}"
        raise _Unreadable(f"not valid JSON: {error.msg} ({place})") from None
    # A number of thousands of digits.
    except ValueError as error:
        raise _Unreadable(f"not valid JSON: {error}") from None
    except RecursionError:
        raise _Unreadable("nested too deeply") from None


def _row(value: Any, where: str) -> Row | Problem:
    if isinstance(value, dict):
        return Row(where, value)
    return Problem(f"{where}: expected an object, got {type(value).__name__}")


def _csv(file: DataFile) -> Iterator[Row | Problem]:
    """The first line names the columns, and shows what delimits them; every value is a string."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    with _open(file.path, newline="") as lines:
        first = lines.readline()
        reader = csv.reader(chain([first], lines), strict=True, delimiter=_delimiter(first))
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise _Unreadable(f"the header names the column {twice!r} twice")
            for number, values in enumerate((v for v in reader if v), 1):
                where = f"{file.name}, row {number} (line {reader.line_num})"
                if len(values) == len(header):
                    yield Row(where, dict(zip(header, values, strict=True)))
                else:
                    yield Problem(
                        f"{where}: {len(values)} fields, but the header has {len(header)}"
                    )
        except csv.Error as error:
            raise _Unreadable(f"line {reader.line_num}: not valid CSV: {error}") from None


def _delimiter(header: str) -> str:
    """A comma, unless the header has none and is several columns by another delimiter."""
    columns = {delimiter: _columns(header, delimiter) for delimiter in (",", *DELIMITERS)}
    if columns[","] > 1:
        return ","
    # The first of those with the most columns; of a sole column that is the comma.
    return max(columns, key=lambda delimiter: columns[delimiter])


def _columns(header: str, delimiter: str) -> int:
    """How many there are; 0 if it is no line of a table, such as one within quotes."""
    try:
        return len(next(csv.reader([header], strict=True, delimiter=delimiter), []))
    except csv.Error:
        return 0


def _parquet(file: DataFile) -> Iterator[Row | Problem]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file.path) as opened:
            for batch in opened.iter_batches(batch_size=PARQUET_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file.name}, row {number}", values)
    except pyarrow.ArrowException as error:
        place = f"behind row {number}: " if number else ""
        raise _Unreadable(f"{place}not readable as Parquet: {error}") from None


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
