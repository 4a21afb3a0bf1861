"""The settings in the guide to loggers work as they stand there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from lorakit.recipes import resolve_recipe

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "loggers.md"
BLOCKS = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_settings_to_check():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS)
def test_a_recipe_takes_them(block: str, make_recipe: Callable[..., str]):
    table = tomli.loads(block)
    resolved = resolve_recipe(make_recipe(**table))
    assert [s.name for s in resolved.loggers] == [logger["name"] for logger in table["loggers"]]
