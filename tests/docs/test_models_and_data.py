"""The recipes in docs/how-to/models-and-data.md are valid as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli

from lorakit.recipes import resolve_table

TEXT = Path(__file__).resolve().parents[2].joinpath("docs", "how-to", "models-and-data.md")
BLOCKS = re.findall(r"```toml\n(.*?)```", TEXT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_recipes_are_valid(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats" / "en").mkdir(parents=True)
    (tmp_path / "chats" / "en" / "a.jsonl").write_text("{}\n")
    ((name, table),) = tomli.loads(block).items()
    assert resolve_table(name, table).name == name


def test_there_are_recipes() -> None:
    assert len(BLOCKS) == 3
