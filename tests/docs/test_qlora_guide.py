"""The recipe and commands in docs/how-to/qlora.md work; its tables hold every name and option."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import tomli
from click.testing import CliRunner

import lorakit
from lorakit.catalog import load_catalog
from lorakit.cli import app
from lorakit.recipes import resolve_table

TEXT = Path(__file__).resolve().parents[2].joinpath("docs", "how-to", "qlora.md").read_text("utf-8")


def test_the_recipe_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("{}\n")
    (tmp_path / "models" / "mistral-7b").mkdir(parents=True)
    (block,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    ((name, table),) = tomli.loads(block).items()
    recipe = resolve_table(name, table)
    assert recipe.quantization is not None
    assert recipe.quantization.name == "nf4"


def test_the_merges_work_and_say_what_the_guide_shows(
    make_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lorakit.train(make_recipe(quantization={"name": "nf4"}), output="runs/my_qlora")
    lines = re.findall(r"(?m)^lorakit (merge .*)$", TEXT)
    assert len(lines) == 2
    (shown,) = re.findall(r"```text\n(.*?)\n```", TEXT, re.DOTALL)
    pattern = re.sub(r"\d[\d.e-]*", r"[\\d.e+-]+", shown)
    for line in lines:
        done = CliRunner().invoke(app, line.split())
        assert done.exit_code == 0, done.output
        assert re.search(pattern, done.output), done.output


def test_every_name_and_option_is_there() -> None:
    catalog = load_catalog()
    for kind in ("quantization", "optimizer"):
        for offered in catalog.offers[kind].values():
            if offered[0].plugin.distribution == "lorakit-bitsandbytes":
                record = offered[0].record
                assert f"`{record.name}`" in TEXT
                assert all(f"`{f.name}`" in TEXT for f in attrs.fields(record.options))


@pytest.mark.parametrize(
    ("name", "bytes_each"),
    [("adamw8bit", 2.03), ("paged_adamw8bit", 2.03), ("paged_adamw", 8), ("lion8bit", 1.02)],
)
def test_the_bytes_of_state_are_so(name: str, bytes_each: float) -> None:
    record = load_catalog().get("optimizer", name)
    shape = (64, 4096)
    found = record.state_bytes(shape, 4, record.options()) / (64 * 4096)
    assert found == pytest.approx(bytes_each, abs=0.005)


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.13), (False, 4.5)])
def test_the_bits_of_a_weight_are_so(double_quant: bool, bits: float) -> None:
    record = load_catalog().get("quantization", "nf4")
    options = record.options(double_quant=double_quant)
    found = 8 * record.stored_bytes((4096, 4096), options) / 4096**2
    assert found == pytest.approx(bits, abs=0.005)
