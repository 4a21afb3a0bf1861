"""Conformance of what a run reads: datasets, weight formats and model sources."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.data.examples import type_problem
from lorakit.options import DataOptions
from lorakit.progress import SilentProgress
from lorakit.protocols import Text
from lorakit.records import DatasetFormat, ModelSource, WeightFormat
from lorakit.testing.failure import ensure
from lorakit.testing.offers import check_offer, make_options

ROLES = ("system", "user", "assistant", "tool")
JUNK_ROWS: tuple[dict[str, Any], ...] = (
    {},
    {"messages": None, "text": 3, "instruction": [], "output": {}},
    {"messages": [], "text": None, "instruction": None, "output": None},
    {"messages": [None, 1, "x"], "text": ["x"], "instruction": 1.5, "output": True},
    {"messages": [{"role": 1, "content": []}]},
    {"messages": {"role": "user"}},
    {"conversations": [None]},
    {"conversations": [{"from": [], "value": 1}]},
)
_UNCLAIMED = ("no/such/thing", "nothing:like/this", "C:\\none", "a" * 5000, "\0", "~no_such_user/x")


def check_dataset(
    record: DatasetFormat,
    row: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Checks a data set format.

    Args:
        record: The format.
        row: One that it reads.
        options: Keys of `[data]`, in place of the defaults.

    Raises:
        ConformanceError: Something does not hold.
    """
    check_offer(record)
    ensure(issubclass(record.options, DataOptions), "options do not extend DataOptions")
    chosen = make_options(record, options, path="sample.jsonl")
    for junk in JUNK_ROWS:
        try:
            record.example(junk, chosen)
        except ValueError as error:
            ensure(str(error).strip(), f"example: says nothing about {junk}")
        except Exception as error:
            ensure(False, f"example: raises {error!r}, not a ValueError, for {junk}")
    if row is None:
        return
    found = record.example(row, chosen)
    ensure(not type_problem(found), f"example: {type_problem(found)}")
    if isinstance(found, Text):
        ensure(found.text, "example: the sample row gives an empty text")
        return
    messages = found.messages
    ensure(messages, "example: the sample row gives a conversation without messages")
    unknown = [m.role for m in messages if m.role not in ROLES]
    ensure(not unknown, f"example: roles {unknown} are none of {ROLES}")


def check_weight_format(record: WeightFormat, path: Path | str | None = None) -> None:
    """Checks a weight format.

    Args:
        record: The format.
        path: A small checkpoint in it, a directory or a file.

    Raises:
        ConformanceError: Something does not hold.
    """
    check_offer(record)
    with tempfile.TemporaryDirectory() as folder:
        empty, text = Path(folder) / "empty", Path(folder) / "notes.txt"
        empty.mkdir()
        text.write_text("no weights here")
        for other in (empty, text, Path(folder) / "absent"):
            ensure(not record.claims(other), f"claims: an unrelated path ({other.name})")
    if path is None:
        return
    ensure(record.claims(Path(path)), f"claims: not the sample {path}")
    checkpoint = record.open(Path(path))
    config = checkpoint.config
    ensure(isinstance(config, Mapping) and config.get("model_type"), "config: no model_type")
    files = checkpoint.files()
    ensure("config.json" not in files, "files: holds config.json")
    ensure(
        all(isinstance(n, str) and isinstance(c, bytes) for n, c in files.items()),
        "files: not bytes by name",
    )
    shards = checkpoint.shards()
    specs = {name: spec for shard in shards.values() for name, spec in shard.items()}
    ensure(specs, "shards: no tensor")
    ensure(len(specs) == sum(map(len, shards.values())), "shards: a name stands in two of them")
    for shard in [*shards, None]:
        wanted = specs if shard is None else shards[shard]
        seen: set[str] = set()
        for name, tensor in checkpoint.tensors(shard):
            ensure(name in wanted and name not in seen, f"tensors: {name} is one too many")
            seen.add(name)
            shape = tuple(specs[name].shape)
            ensure(tuple(tensor.shape) == shape, f"tensors: {name} is not {shape} as in shards")
            ensure(tensor.device.type == "cpu", f"tensors: {name} is on {tensor.device}")
        ensure(seen == set(wanted), f"tensors: lacks {sorted(set(wanted) - seen)[:3]}")


def check_model_source(record: ModelSource, path: str | None = None) -> None:
    """Checks a model source.

    Args:
        record: The source.
        path: A `model.path` that it can get without a network.

    Raises:
        ConformanceError: Something does not hold.
    """
    check_offer(record)
    ensure(record.examples, "examples: none")
    for other in _UNCLAIMED:
        try:
            claimed = record.claims(other)
        except Exception as error:
            ensure(False, f"claims: raises {error!r} for {other[:20]!r}")
        ensure(not claimed, f"claims: {other[:20]!r}")
    if path is None:
        return
    ensure(record.claims(path), f"claims: not the sample {path}")
    first = record.fetch(path, SilentProgress())
    ensure(first.exists(), f"fetch: {first} does not exist")
    ensure(record.fetch(path, SilentProgress()) == first, "fetch: another place the second time")
