"""Data sets from a hub: the files of one split, and nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorakit.catalog import load_catalog
from lorakit.data.evaluation_set import load_evaluation
from lorakit.data.files import find_data_files
from lorakit.data.hub_files import files_of_split
from lorakit.data.rows import Row, read_rows
from lorakit.data.tokenizer import load_tokenizer
from lorakit.errors import UserError
from lorakit.options import EvaluationOptions
from lorakit.progress import SilentProgress

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: {train}
  - split: test
    path: held-out/*
---
# Rows
"""


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of(path: str, **options: str) -> list[tuple[str, dict[str, Any]]]:
    found = list(read_rows(find_data_files(path, SilentProgress(), **options)))
    assert all(isinstance(row, Row) for row in found), found
    return [(row.where, row.values) for row in found if isinstance(row, Row)]


def test_parquet_files_of_the_train_split(hub: Any, offline: Callable[[], None]) -> None:
    files = {
        "README.md": b"# No header\n",
        "data/train-00000-of-00002.parquet": parquet([{"text": "a"}, {"text": "b"}]),
        "data/train-00001-of-00002.parquet": parquet([{"text": "c"}]),
        "data/test-00000-of-00001.parquet": parquet([{"text": "d"}]),
        "train.jsonl": jsonl([{"text": "the same rows once more"}]),
    }
    hub.add("datasets/acme/rows", files)
    rows = rows_of("acme/rows")
    assert rows == [
        ("acme/rows: data/train-00000-of-00002.parquet, row 1", {"text": "a"}),
        ("acme/rows: data/train-00000-of-00002.parquet, row 2", {"text": "b"}),
        ("acme/rows: data/train-00001-of-00002.parquet, row 1", {"text": "c"}),
    ]
    assert hub.fetched() == [
        *("README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    ]
    offline()
    assert rows_of("acme/rows") == rows


def test_an_evaluation_over_the_other_split(hub: Any, tokenizer_dir: Path) -> None:
    """`evaluation.split` alone is of the recipe's own data set; its errors are the section's."""
    files = {"train.jsonl": jsonl([{"text": "a b"}]), "dev.jsonl": jsonl([{"text": "c"}] * 3)}
    hub.add("datasets/acme/rows", files)
    tokenizer = load_tokenizer({f.name: f.read_bytes() for f in tokenizer_dir.iterdir()}, "here")
    catalog = load_catalog()
    form = catalog.get("dataset", "text")
    data = form.options(path="acme/rows")

    def rows(**options: Any) -> Sequence[str]:
        chosen = EvaluationOptions(**options)
        progress = SilentProgress()
        return load_evaluation(form, data, chosen, tokenizer, progress, catalog=catalog).where

    assert rows(split="validation") == tuple(f"acme/rows: dev.jsonl, line {n}" for n in (1, 2, 3))
    assert rows(split="validation", max_rows=2) == rows(split="validation")[:2]
    assert rows(files="dev.jsonl") == rows(split="validation")
    assert rows(path="acme/rows") == ("acme/rows: train.jsonl, line 1",)
    with pytest.raises(UserError, match=r"^evaluation\.path: .* of the split 'none'") as error:
        rows(split="none")
    assert error.value.fix.startswith("Set evaluation.files to a glob over them: ")


def test_the_card_names_the_files(hub: Any) -> None:
    files = {
        "README.md": CARD.format(train="[first/*.jsonl, second.json]").encode(),
        "first/a.jsonl": jsonl([{"text": "a"}]),
        "first/deeper/x.jsonl": jsonl([{"text": "x"}]),
        "second.json": json.dumps([{"text": "b"}]).encode(),
        "held-out/c.csv": b"text\nc\n",
        "train.jsonl": jsonl([{"text": "y"}]),
    }
    hub.add("datasets/acme/rows", files)
    assert [values["text"] for _, values in rows_of("acme/rows")] == ["a", "b"]
    assert [values["text"] for _, values in rows_of("acme/rows", split="test")] == ["c"]
    assert hub.fetched() == ["README.md", "first/a.jsonl", "held-out/c.csv", "second.json"]
    with pytest.raises(UserError, match=r"no split 'tset' \(did you mean 'test'\?\)"):
        rows_of("acme/rows", split="tset")


def test_files_picks_by_glob(hub: Any) -> None:
    hub.add(
        "datasets/acme/rows",
        {"README.md": b"", "en/1.jsonl": jsonl([{"t": 1}]), "de/1.jsonl": jsonl([{"t": 2}])},
    )
    assert [values for _, values in rows_of("acme/rows", pattern="de/*")] == [{"t": 2}]
    assert hub.fetched() == ["de/1.jsonl"]
    with pytest.raises(UserError, match=r"matches data\.files = 'fr/\*'") as error:
        rows_of("acme/rows", pattern="fr/*")
    assert error.value.fix == "It has de/1.jsonl and en/1.jsonl."


def test_the_revision(hub: Any) -> None:
    hub.add("datasets/acme/rows", {"rows.csv": b"text\na\n"})
    ((where, _),) = rows_of("acme/rows@v1")
    assert where == "acme/rows@v1: rows.csv, row 1 (line 2)"
    assert hub.log[0] == "GET api/datasets/acme/rows/revision/v1"


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["alpaca_data_cleaned.json"], "train", ["alpaca_data_cleaned.json"]),
        (["train.csv", "test.csv", "valid.csv"], "train", ["train.csv"]),
        (["train.csv", "test.csv", "valid.csv"], "validation", ["valid.csv"]),
        (["train-b.jsonl", "train-a.jsonl.gz"], "train", ["train-a.jsonl.gz", "train-b.jsonl"]),
        (["rows.json", "test.json"], "train", ["rows.json"]),
        (["train/b.jsonl", "train/a.jsonl", "test/a.jsonl"], "train",
         ["train/a.jsonl", "train/b.jsonl"]),
        (["train.json", "train.parquet"], "train", ["train.parquet"]),
        (["my_training_set.json", "other.json"], "train", ["my_training_set.json"]),
        (["data/train_sft-0-of-1.parquet", "data/test_sft-0-of-1.parquet"], "train_sft",
         ["data/train_sft-0-of-1.parquet"]),
    ],
)  # fmt: skip
def test_names_tell_the_split(names: list[str], split: str, expected: list[str]) -> None:
    assert files_of_split(sorted(names), {}, split, "acme/rows") == expected


@pytest.mark.parametrize(
    ("data_files", "expected"),
    [
        ("a.json", ["a.json"]),
        (["a.json", "sub/*.json"], ["a.json", "sub/b.json"]),
        ("**/*.json", ["a.json", "sub/b.json"]),
        ({"train": "sub/[ab].json"}, ["sub/b.json"]),
        ([{"split": "train", "path": ["sub/b.json"]}], ["sub/b.json"]),
    ],
)
def test_the_forms_of_a_card(data_files: Any, expected: list[str]) -> None:
    card = {"configs": [{"config_name": "x", "data_files": data_files}]}
    assert files_of_split(["a.json", "sub/b.json"], card, "train", "acme/rows") == expected


@pytest.mark.parametrize("card", [{}, {"configs": None}, {"configs": ["x", 1]}, {"configs": {}}])
def test_names_that_do_not_tell_are_listed(card: Any) -> None:
    with pytest.raises(UserError, match="neither the card") as error:
        files_of_split(["a.json", "b.json"], card, "train", "acme/rows")
    assert error.value.fix == "Set data.files to a glob over them: it has a.json and b.json."


def test_the_default_of_several_configurations() -> None:
    configs = [{"config_name": n, "data_files": f"{n}.json"} for n in ("de", "en")]
    names = ["de.json", "en.json"]
    with pytest.raises(UserError, match="has 2 configurations: de and en"):
        files_of_split(names, {"configs": configs}, "train", "acme/rows")
    configs[1]["default"] = True  # type: ignore[assignment]
    assert files_of_split(names, {"configs": configs}, "train", "acme/rows") == ["en.json"]


def test_a_folder_of_a_configuration() -> None:
    card = {"configs": [{"config_name": "default", "data_dir": "v2"}]}
    names = ["v1/train.csv", "v2/test.csv", "v2/train.csv"]
    assert files_of_split(names, card, "train", "acme/rows") == ["v2/train.csv"]
