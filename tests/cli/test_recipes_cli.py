"""`lorakit recipes ...`: list, show, copy, validate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli

from lorakit.recipe_files import packed_file, read_recipes
from lorakit.recipes import resolve_recipe, resolve_table

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[2]
PACKED = packed_file()

MINE = """\
# What all of them share.
[base]
summary = "the base"   # never trained itself
output = "out"
model = {{name = "llama", path = "{model}"}}
data = {{name = "messages", path = "lorakit:about_lorakit.jsonl"}}

# Two lines
# above the header.
[mine]
extends = "base"
summary = "mine"
# Within.
[mine.adapter]
name = "lora"
targets = [
    "q_proj",  # only queries
]

# About the last one.
[last]
extends = "mine"
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def mine(tmp_path: Path, checkpoint: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(MINE.format(model=checkpoint), encoding="utf-8")
    return file


def test_list(cli: Cli, mine: Path, elsewhere: Path) -> None:
    done = cli("recipes", "list")
    assert done.status == 0
    assert [line.split()[0] for line in done.out.splitlines()] == PACKED.names()
    assert PACKED.tables["quickstart"]["summary"] in done.out
    done = cli("recipes", "list", mine)
    assert done.out.splitlines() == ["base  the base", "mine  mine", "last  mine"]


@pytest.mark.parametrize("name", ["base", "mine", "last"])
def test_show_resolves_to_an_equal_recipe(name: str, cli: Cli, mine: Path) -> None:
    done = cli("recipes", "show", f"{mine}:{name}")
    assert done.status == 0
    tables = tomli.loads(done.out)
    recipe = resolve_recipe(f"{mine}:{name}")
    assert list(tables) == [name]
    assert tables[name] == recipe.table()
    assert resolve_table(name, tables[name]) == recipe
    spelled_out = tables[name]["training"]
    assert spelled_out["epochs"] == 1
    assert "extends" not in tables[name]


@pytest.mark.parametrize("name", PACKED.names())
def test_show_of_a_packed_recipe(name: str, cli: Cli, elsewhere: Path) -> None:
    done = cli("recipes", "show", name)
    (table,) = tomli.loads(done.out).values()
    assert resolve_table(name, table) == resolve_recipe(name)


@pytest.mark.parametrize("name", PACKED.names())
def test_packed_recipes_are_valid(name: str, cli: Cli, elsewhere: Path) -> None:
    for reference in (name, f"recipes.toml:{name}", f"{ROOT / 'recipes.toml'}:{name}"):
        done = cli("recipes", "validate", reference)
        assert (done.status, done.out, done.err) == (0, f"{reference}: valid\n", "")


def test_validate_a_whole_file(cli: Cli, mine: Path, elsewhere: Path) -> None:
    done = cli("recipes", "validate", mine)
    assert done.status == 0
    assert done.out.splitlines() == [f"{mine}:{name}: valid" for name in ("base", "mine", "last")]
    done = cli("recipes", "validate", "recipes.toml")
    assert done.out.splitlines() == [f"recipes.toml:{name}: valid" for name in PACKED.names()]


def test_validate_goes_on_after_a_wrong_one(cli: Cli, mine: Path) -> None:
    text = mine.read_text(encoding="utf-8")
    mine.write_text(text + "[wrong]\nextends = 'base'\nsed = 1\n[after]\nextends = 'base'\n")
    done = cli("recipes", "validate", mine)
    assert done.status == 2
    assert f"{mine}:after: valid" in done.out
    assert done.err.startswith(f"error: {mine}:wrong: 1 problem\n  sed: unknown key")


def test_validate_with_set(cli: Cli, mine: Path) -> None:
    done = cli("recipes", "validate", f"{mine}:mine", "--set", "adapter.rank=0")
    assert done.status == 2
    assert "adapter.rank: must be >= 1: 0" in done.err


def test_a_recipes_toml_here_hides_the_packed_one(
    cli: Cli, mine: Path, elsewhere: Path, checkpoint: Path
) -> None:
    (elsewhere / "recipes.toml").write_text(MINE.format(model=checkpoint), encoding="utf-8")
    assert cli("recipes", "validate", "recipes.toml:mine").status == 0
    done = cli("recipes", "validate", "recipes.toml:quickstart")
    assert done.status == 2
    assert "no recipe 'quickstart'" in done.err
    assert cli("recipes", "validate", "quickstart").status == 0


def test_unknown_names(cli: Cli, mine: Path, elsewhere: Path) -> None:
    done = cli("recipes", "show", "quickstar")
    assert done.status == 2
    assert "no recipe 'quickstar' (did you mean 'quickstart'?)" in done.err
    done = cli("recipes", "show", mine)
    assert done.status == 2
    assert f"{mine} holds 3 recipes: base, mine and last" in done.err
    done = cli("train", elsewhere)
    assert done.status == 2
    assert f"{elsewhere} is a path, not a recipe" in done.err


def test_a_files_name_without_its_ending(cli: Cli, mine: Path, elsewhere: Path) -> None:
    (elsewhere / "mine.toml").write_bytes(mine.read_bytes())
    done = cli("train", "mine")
    assert done.status == 2
    assert "here is a file mine.toml (it holds base, mine and last)" in done.err
    assert "mine.toml:NAME" in done.err
    (elsewhere / "mine.toml").write_text("[one]\n", encoding="utf-8")
    assert "mine.toml:one" in cli("train", "mine").err
    # A recipe that ships with lorakit stays the one of that name.
    (elsewhere / "quickstart.toml").write_text("[one]\n", encoding="utf-8")
    assert cli("recipes", "validate", "quickstart").status == 0


def test_copy_to_a_new_file(cli: Cli, elsewhere: Path) -> None:
    done = cli("recipes", "copy", "quickstart")
    assert done.status == 0
    copy = elsewhere / "recipes.toml"
    assert copy.read_text(encoding="utf-8") == PACKED.source("quickstart")
    assert "# A small chat model learns what lorakit is" in copy.read_text(encoding="utf-8")
    assert resolve_recipe(f"{copy}:quickstart") == resolve_recipe("quickstart")


def test_copy_brings_what_the_recipe_extends(cli: Cli, mine: Path, elsewhere: Path) -> None:
    assert cli("recipes", "copy", f"{mine}:last", elsewhere).status == 0
    copy = elsewhere / "recipes.toml"
    assert copy.read_text(encoding="utf-8") == mine.read_text(encoding="utf-8")


def test_copy_leaves_others_and_their_comments_behind(cli: Cli, mine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.toml"
    assert cli("recipes", "copy", f"{mine}:mine", copy).status == 0
    text = copy.read_text(encoding="utf-8")
    assert text == mine.read_text(encoding="utf-8").partition("\n# About the last one.")[0]
    assert read_recipes(copy).names() == ["base", "mine"]
    assert resolve_recipe(f"{copy}:mine") == resolve_recipe(f"{mine}:mine")


def test_copy_into_an_existing_file(cli: Cli, mine: Path) -> None:
    before = mine.read_text(encoding="utf-8")
    assert cli("recipes", "copy", "quickstart", mine).status == 0
    after = mine.read_text(encoding="utf-8")
    assert after.startswith(before)
    assert after.endswith(PACKED.source("quickstart"))
    assert read_recipes(mine).names() == ["base", "mine", "last", "quickstart"]
    assert resolve_recipe(f"{mine}:quickstart") == resolve_recipe("quickstart")


def test_copy_over_a_recipe_of_that_name(cli: Cli, mine: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("[base]\n# precious\n", encoding="utf-8")
    done = cli("recipes", "copy", f"{mine}:mine", other)
    assert done.status == 2
    assert f"{other} holds a recipe 'base' already" in done.err
    assert other.read_text(encoding="utf-8") == "[base]\n# precious\n"


def test_copy_to_what_is_no_recipe_file(cli: Cli, elsewhere: Path) -> None:
    done = cli("recipes", "copy", "quickstart", "mine.txt")
    assert done.status == 2
    assert "mine.txt: a recipe file ends in .toml" in done.err
    assert list(elsewhere.iterdir()) == []
