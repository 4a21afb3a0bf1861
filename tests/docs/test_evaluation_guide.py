"""The settings and commands in the guide to held-out evaluation work as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import tomli

from lorakit.cli import app
from lorakit.options import EvaluationOptions
from lorakit.recipes import parse_override, resolve_recipe, resolve_table

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "how-to" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
]


def test_there_is_something_to_check():
    assert len(BLOCKS) == 4
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("block", BLOCKS)
def test_a_recipe_takes_them(
    block: str, make_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unseen.jsonl").write_text("{}\n")
    ((name, table),) = tomli.loads(block).items()
    assert table.pop("extends") == "base"
    base = resolve_recipe(make_recipe()).table()
    evaluation = resolve_table(name, {**base, **table}).evaluation
    assert evaluation is not None
    assert table["evaluation"].items() <= attrs.asdict(evaluation).items()


def test_its_setting_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    _, verb, reference, flag, setting = shlex.split(COMMANDS[0])
    assert (verb, flag) == ("train", "--set")
    recipe = resolve_recipe(reference, overrides=dict([parse_override(setting)]))
    assert recipe.evaluation == EvaluationOptions(fraction=0.1)


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_its_commands_exist_with_their_options(command: str):
    _, verb, _, *rest = shlex.split(command)
    options = {flag for parameter in app.commands[verb].params for flag in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options


def test_it_names_what_there_is():
    keys = {field.name for field in attrs.fields(EvaluationOptions)}
    shown = set(re.findall(r"`(\w+)(?: = [^`]*)?`", GUIDE))
    assert {"at_start", "every_steps", "max_rows"} <= shown & keys
