"""`lorakit plugins list`, for people; tests/plugins has it for other programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from lorakit import catalog


def test_columns_hold_with_long_names(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = catalog.load_catalog()
    offered = loaded.offers["optimizer"]["adamw"][0]
    long = evolve(offered, record=evolve(offered.record, name="a_very_long_name_of_one"))
    loaded.offers["optimizer"][long.record.name] = [long]
    monkeypatch.setattr(catalog, "load_catalog", lambda: loaded)
    lines = cli("plugins", "list").out.partition("\n\n")[0].splitlines()
    rows = [line for line in lines if line.startswith("  ")]
    columns = [re.split(r"  +", row.strip()) for row in rows]
    assert ["optimizer", long.record.name, long.record.summary] in columns
    pairs = list(zip(rows, columns, strict=True))
    assert len({row.index(f"  {name} ") for row, (_, name, _) in pairs}) == 1
    assert len({len(row.removesuffix(summary)) for row, (_, _, summary) in pairs}) == 1
