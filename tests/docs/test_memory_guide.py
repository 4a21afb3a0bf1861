"""The recipe in the memory guide is valid, and its keys do what the guide says."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tomli

from lorakit.catalog import load_catalog
from lorakit.recipes import resolve_table

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "memory.md").read_text()


BLOCKS = [tomli.loads(block) for block in re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)]


@pytest.mark.parametrize("recipes", BLOCKS, ids=lambda recipes: next(iter(recipes)))
def test_its_recipes_resolve(recipes: dict[str, Any], tmp_path: Path):
    ((name, table),) = copy.deepcopy(recipes).items()
    del table["extends"]
    (tmp_path / "data.jsonl").write_text("{}\n")
    table["output"] = str(tmp_path / "run")
    table["model"] = {"name": "llama", "path": str(tmp_path)}
    table["data"] = {"name": "messages", "path": str(tmp_path / "data.jsonl")}
    recipe = resolve_table(name, table)
    assert recipe.precision.name == recipes[name].get("precision", {}).get("name", "fp32")
    mode, limit = recipe.training.activation_checkpointing, recipe.training.memory_limit
    assert (mode, limit) == {"small": ("block", 0.0), "long": ("auto", 2.4)}[name]


def test_it_has_every_precision():
    named = set(re.findall(r"^\| `(\w+)` \| \w+ \| ", GUIDE, re.MULTILINE))
    builtin = {
        name
        for name, offered in load_catalog().offers["precision"].items()
        if offered[0].plugin.name == "builtin"
    }
    assert named == builtin
