"""The guide to generate and eval: its commands work as they stand, its tables are complete."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import lorakit
from lorakit.cli import app
from lorakit.cli.adapters import generate

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "ask-and-measure.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_commands_work_on_a_run(
    make_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    reference = make_recipe()
    lorakit.train(reference, output="runs/mine")
    data = Path(reference.rpartition("/")[0]) / "data.jsonl"
    Path("held_out.jsonl").write_text(data.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr("lorakit.cli.adapters.at_terminal", lambda: True)
    lines = "".join(re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)).splitlines()
    assert len(lines) == 7
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line)[1:], input="What is it?\n/reset\n/exit\n")
        assert done.exit_code == 0, done.output
        if "--json" in line:
            keys = json.loads(done.stdout)
            assert [key for key in keys if f"`{key}`" not in TEXT] == []
        elif "--prompt" not in line and "generate" in line:
            assert "(forgotten)" in done.output


def test_the_tables_have_the_options():
    ours = {flag for p in generate.params for flag in p.opts if flag.startswith("--")}
    told = set(re.findall(r"`(--[\w-]+)(?: -)?`", TEXT))
    assert ours - told == {"--device"}
    defaults = re.findall(r"^\| `(--[\w-]+)` \| (\d+) \|", TEXT, re.MULTILINE)
    assert len(defaults) == 2
    for name, default in defaults:
        (option,) = (p for p in generate.params if name in p.opts)
        assert option.default == int(default)
