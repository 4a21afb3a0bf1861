"""The commands, the recipe and the code in the guide to exporting work as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import tomli
from click.testing import CliRunner

import lorakit
from lorakit.cli import app
from lorakit.recipes import resolve_table

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "export.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_recipe_is_valid():
    (block,) = blocks("toml")
    ((name, table),) = tomli.loads(block).items()
    options = resolve_table(name, table).adapter.options
    assert options.rank_at("model.layers.29.mlp.up_proj") == 32
    assert options.rank_at("model.layers.2.mlp.up_proj") == 8
    assert options.scale_at("model.layers.2.self_attn.q_proj") == 2


def test_code_and_commands_work_on_a_run(make_recipe, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lorakit.train(make_recipe(), output="runs/mine")
    (code,) = blocks("python")
    names = {}
    exec(code.replace('"BASE"', repr(str(checkpoint))), names)
    assert "lora_A" in str(names["model"])
    recipe, name = make_recipe().rsplit(":", 1)
    text = Path(recipe).read_text(encoding="utf-8")
    Path("mine.toml").write_text(text.replace(f"[{name}", "[mine"), encoding="utf-8")
    for line in "".join(blocks("console")).splitlines():
        done = CliRunner().invoke(app, line.split()[1:])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "merged" / "config.json").is_file()
    assert (tmp_path / "runs" / "more" / "adapter").is_dir()
