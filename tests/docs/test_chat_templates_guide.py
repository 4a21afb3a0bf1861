"""The guide to chat templates: its settings resolve, its table lists the built-in formats."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from lorakit.data.chat_format import built_in, built_in_names
from lorakit.recipes import resolve_recipe

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "how-to" / "chat-templates.md").read_text(encoding="utf-8")
KEYS = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_recipe_takes_them(
    block: str, make_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = tomli.loads(block)
    monkeypatch.chdir(tmp_path)
    Path(table["data"]["path"]).write_text("{}\n")
    resolved = resolve_recipe(make_recipe(**table))
    assert resolved.data.options.chat_template == table["data"]["chat_template"]


def test_the_table_has_every_format_and_its_tokens():
    assert len(BLOCKS) == 2
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \| [^|]*\|$", GUIDE, re.MULTILINE))
    assert set(rows) == set(built_in_names())
    for name, needed in rows.items():
        for token in re.findall(r"`(.+?)`", needed.replace("\\|", "|")):
            assert token in built_in(name), name
        assert f"`{name}`" in KEYS
