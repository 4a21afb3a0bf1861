"""The recipe in the memory guide is valid, and its keys do what the guide says."""

from __future__ import annotations

import re
from pathlib import Path

import tomli

from lorakit.catalog import load_catalog
from lorakit.recipes import resolve_table

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "memory.md").read_text()


def test_its_recipe_resolves(tmp_path: Path):
    (block,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    ((name, table),) = tomli.loads(block).items()
    del table["extends"]
    (tmp_path / "data.jsonl").write_text("{}\n")
    table["output"] = str(tmp_path / "run")
    table["model"] = {"name": "llama", "path": str(tmp_path)}
    table["data"] = {"name": "messages", "path": str(tmp_path / "data.jsonl")}
    recipe = resolve_table(name, table)
    assert recipe.precision.name == "bf16"
    assert recipe.training.activation_checkpointing


def test_it_has_every_precision():
    named = set(re.findall(r"^\| `(\w+)` \| \w+ \| ", GUIDE, re.MULTILINE))
    builtin = {
        name
        for name, offered in load_catalog().offers["precision"].items()
        if offered[0].plugin.name == "builtin"
    }
    assert named == builtin
