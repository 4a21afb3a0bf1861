"""What README and the recipe reference say is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomli
from click.testing import CliRunner

from lorakit.catalog import KINDS, load_catalog
from lorakit.cli import app
from lorakit.options import (
    EvaluationOptions,
    SampleOptions,
    ScheduleOptions,
    TrainingOptions,
)
from lorakit.recipes import RunOptions, resolve_table

ROOT = Path(__file__).resolve().parents[2]
README_TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
KEYS = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
SHOWN = "\n".join(re.findall(r"```console\n(.*?)```", README_TEXT, re.DOTALL))
COMMANDS = [
    command
    for file in (SHOWN, (ROOT / "recipes.toml").read_text(encoding="utf-8"))
    for command in re.findall(r"^#? *(lorakit [a-z].*?)(?: {2,}.*)?$", file, re.MULTILINE)
]


def options_of_builtin() -> list[tuple[str, type[Any]]]:
    catalog = load_catalog()
    found = [
        (f"{kind}: {name}", offered[0].record.options)
        for kind in KINDS
        for name, offered in catalog.offers[kind].items()
        if offered[0].plugin.name == "builtin"
    ]
    own = (RunOptions, ScheduleOptions, SampleOptions, TrainingOptions, EvaluationOptions)
    return found + [(cls.__name__, cls) for cls in own]


@pytest.mark.parametrize(("where", "options"), options_of_builtin())
def test_every_key_of_a_recipe_is_in_the_reference(where: str, options: type[Any]):
    missing = [f.name for f in attrs.fields(options) if f"`{f.name}`" not in KEYS]
    assert not missing, where


def test_the_readmes_recipe_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (block,) = re.findall(r"```toml\n(.*?)```", README_TEXT, re.DOTALL)
    ((name, table),) = tomli.loads(block).items()
    monkeypatch.chdir(tmp_path)
    Path(table["data"]["path"]).write_text("{}\n")
    Path(table["model"]["path"]).mkdir(parents=True)
    assert resolve_table(name, table).adapter.options.rank == 16


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readmes_commands_exist_with_their_options(command: str):
    words = shlex.split(command)[1:]
    group: Any = app
    while words and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]
    assert group is not app
    options = {flag for parameter in group.params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    assert CliRunner().invoke(group, ["--help"]).exit_code == 0
