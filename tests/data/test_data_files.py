"""Local data files: every format, directories and globs, compressed or not."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.files import check_data_path, find_data_files, find_local_files, matching
from lorakit.data.rows import Problem, Row, read_rows
from lorakit.errors import UserError
from lorakit.progress import SilentProgress

ROWS = [{"text": "eins"}, {"text": 'zw"ei,\n zwölf'}, {"text": "drei"}]


def as_jsonl(rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: Any) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Any], bytes]] = {
    ".jsonl": as_jsonl,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": as_csv,
    ".parquet": as_parquet,
    ".jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    ".json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    ".csv.gz": lambda rows: gzip.compress(as_csv(rows)),
}


def read(path: object, pattern: str = "") -> list[Row | Problem]:
    return list(read_rows(find_local_files(str(path), pattern)))


def values(found: list[Row | Problem]) -> list[Any]:
    assert all(isinstance(row, Row) for row in found), found
    return [row.values for row in found if isinstance(row, Row)]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(WRITERS[suffix](ROWS))
    assert values(read(file)) == ROWS
    assert values(read(file.rename(tmp_path / f"ROWS{suffix.upper()}"))) == ROWS


def test_json_with_an_object_a_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(as_jsonl(ROWS))
    assert values(read(file)) == ROWS


def test_parquet_keeps_lists_and_tables(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "id": n} for n in range(2500)]
    file = tmp_path / "rows.parquet"
    file.write_bytes(as_parquet(rows))
    found = read(file)
    assert values(found) == rows
    assert found[2499].where == f"{file}, row 2500"  # type: ignore[union-attr]


def test_a_long_csv_field(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(as_csv([{"text": "x" * 300_000}]))
    assert values(read(file)) == [{"text": "x" * 300_000}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a;b\n1,5;2\n", {"a": "1,5", "b": "2"}),
        ("a\tb\n1;5\t2,0\n", {"a": "1;5", "b": "2,0"}),
        ('"a";"b"\n"1;\n5";2\n', {"a": "1;\n5", "b": "2"}),
        ("a;b,c\n1,2\n", {"a;b": "1", "c": "2"}),
        ('"a;b"\n1\n', {"a;b": "1"}),
        ("a\n1;2\n", {"a": "1;2"}),
        ('"a\n;b"\n1\n', {"a\n;b": "1"}),
        ("a;b\r\n1;2\r\n", {"a": "1", "b": "2"}),
    ],
)
def test_the_header_shows_what_delimits_a_csv(
    content: str, expected: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(content.encode())
    assert values(read(file)) == [expected]


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2)))
def test_whatever_the_csv_module_writes_is_read(table: list[list[str]]) -> None:
    import tempfile

    # A bare carriage return cannot be told from the end of a line, nor a null from damage.
    table = [[c.replace("\r", "").replace("\0", "") for c in line] for line in table]
    rows = [dict(zip("ab", line, strict=True)) for line in table]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.csv"
        file.write_bytes(as_csv([*rows, {"a": "1", "b": "2"}]))
        assert values(read(file)) == [*rows, {"a": "1", "b": "2"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory of files in several formats, one a row."""
    for name in ("b.jsonl", "a.csv", "sub/c.parquet", "sub/d.json", "_part/x.jsonl", ".y.jsonl"):
        file = tmp_path / "rows" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(WRITERS[file.suffix]([{"text": file.stem}]))
    (tmp_path / "rows" / "README.md").write_text("no rows")
    (tmp_path / "rows" / "dataset_info.json").write_text("{}")
    return tmp_path / "rows"


def test_a_directory_is_read_in_order(folder: Path) -> None:
    found = read(folder)
    assert [row["text"] for row in values(found)] == ["a", "b", "c", "d"]
    assert found[2].where == f"{folder / 'sub' / 'c.parquet'}, row 1"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*", "ab"), ("**/*.json*", "bd"), ("sub/*", "cd"), ("[!b]*", "a"), ("sub/?.json", "d")],
)
def test_files_of_a_directory(pattern: str, expected: str, folder: Path) -> None:
    assert [row["text"] for row in values(read(folder, pattern))] == list(expected)


def test_a_glob(folder: Path) -> None:
    assert [row["text"] for row in values(read(folder / "*.[cj]s*"))] == ["a", "b"]
    assert [row["text"] for row in values(read(folder / "**" / "[ad].*"))] == ["a", "d"]


def test_a_file_with_brackets_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "rows[1].jsonl"
    file.write_bytes(as_jsonl(ROWS))
    assert values(read(file)) == ROWS


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("rows/*.txt", "", "no file matches "),
        ("rows/*", "", "README.md: expected a file ending in .jsonl, .json, .csv or .parquet"),
        ("rows/sub", "*.csv", "has no data file that matches data.files = '*.csv'"),
        ("row", "", "(did you mean 'rows'?)"),
        ("rosw/a.csv", "", "rows'?)"),
        ("rows/README.md", "", "expected a file ending in"),
    ],
)
def test_nothing_to_read(path: str, pattern: str, expected: str, folder: Path) -> None:
    with pytest.raises(UserError) as error:
        check_data_path(str(folder.parent / path), pattern)
    assert expected in error.value.message


@pytest.mark.parametrize("path", ["rows/b.jsonl", "rows", "rows/*.csv", "lorakit:"])
def test_a_split_of_local_files_is_refused(path: str, folder: Path) -> None:
    shipped = path == "lorakit:"
    path = "lorakit:about_lorakit.jsonl" if shipped else str(folder.parent / path)
    check_data_path(path, split="train")
    with pytest.raises(UserError) as error:
        check_data_path(path, split="test")
    assert error.value.message == (
        f"data.split: 'test' is of a data set on the hub, but data.path {path} is on this machine"
    )
    with pytest.raises(UserError, match=r"data\.split: 'test'"):
        find_data_files(path, SilentProgress(), split="test")


def test_a_hub_id_is_taken_on_trust_but_a_file_of_that_shape_is_not() -> None:
    check_data_path("owner/name@revision")
    with pytest.raises(UserError, match=r"no file data/none\.jsonl"):
        check_data_path("data/none.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.csv", b"a,b\n1,2\n3\n", "x.csv, row 2 (line 3): 1 fields, but the header has 2"),
        ("x.csv", b"a,b\n1,2,3\n", "x.csv, row 1 (line 2): 3 fields, but the header has 2"),
        ("x.csv", b"a,a\n1,2\n", "x.csv: the header names the column 'a' twice"),
        ("x.csv", b'a\n"1\n', "x.csv: line 2: not valid CSV"),
        ("x.csv", b"a,b\n", "x.csv: the file holds no row"),
        ("x.csv", b"", "x.csv: the file holds no row"),
        ("x.csv", b"a\n\xff\n", "x.csv: cannot be read"),
        ("x.json", b'{"a": 1}', ""),
        ("x.json", b'{\n"a": 1}', "x.json: expected a list of objects, got dict"),
        (
            "x.json",
            b'{\n"data": []}',
            "x.json: expected a list of objects, got dict: expected is [{",
        ),
        ("x.csv", b"a;b\n1,2\n", "x.csv, row 1 (line 2): 1 fields, but the header has 2"),
        ("x.json", b"[1]", "x.json, row 1: expected an object, got int"),
        ("x.parquet", b"PAR1 no", "x.parquet: not readable as Parquet"),
        ("x.parquet", b"", "x.parquet: not readable as Parquet"),
        ("x.jsonl.gz", b"plain", "x.jsonl.gz: cannot be read"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9], "x.jsonl.gz: cannot be read"),
    ],
)
def test_files_that_are_wrong(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    problems = [p.message for p in read(file) if isinstance(p, Problem)]
    assert [p for p in problems if p.startswith(f"{tmp_path}/{expected}")] if expected else True
    assert len(problems) == bool(expected)


def test_reading_goes_on_behind_a_wrong_row_and_a_wrong_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1}\nno\n{"text": 2}\n')
    (tmp_path / "b.parquet").write_text("no")
    (tmp_path / "c.csv").write_text("text\n3\n")
    kinds = [type(row).__name__ for row in read(tmp_path)]
    assert kinds == ["Row", "Problem", "Row", "Problem", "Row"]


@given(st.text("ab*/?[]!.-", max_size=12), st.lists(st.text("ab/.-", max_size=8), max_size=4))
def test_any_glob_matches_or_is_refused(pattern: str, names: list[str]) -> None:
    with contextlib.suppress(UserError):
        assert set(matching(names, pattern)) <= set(names)
