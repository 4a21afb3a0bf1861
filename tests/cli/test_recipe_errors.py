"""Recipes that are wrong: every problem at once, each with its full key and the nearest fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import field, frozen
from attrs.validators import in_

from lorakit.errors import RecipeError, UserError
from lorakit.foreign_names import OURS
from lorakit.recipe_files import parse_recipes
from lorakit.recipes import parse_override, resolve_recipe
from lorakit.structuring import structure

MakeRecipe = Callable[..., str]
NO_DATA = Path(__file__).parent
SHIPPED = "lorakit:about_lorakit.jsonl"


@pytest.fixture
def problems_of(make_recipe: MakeRecipe) -> Callable[..., tuple[str, ...]]:
    """The problems of a small recipe with these sections merged in."""

    def problems_of(**sections: Any) -> tuple[str, ...]:
        with pytest.raises(RecipeError) as error:
            resolve_recipe(make_recipe(**sections))
        return error.value.problems

    return problems_of


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "mine.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_all_problems_at_once(make_recipe: MakeRecipe, cli: Callable[..., Any]) -> None:
    reference = make_recipe(
        sed=1,
        trainig={"epochs": 2},
        training={"epochs": 0, "batchsize": 4},
        adapter={"rnk": 8, "rank": "16"},
        optimizer={"name": "adamv"},
        schedule={"name": "cosin"},
        loggers=[{"name": "disk"}, {"name": "terminl"}],
    )
    expected = [
        "sed: unknown key (did you mean 'seed'?)",
        "trainig: unknown section (did you mean 'training'?)",
        "adapter.rnk: unknown key (did you mean 'rank'?)",
        'adapter.rank: expected a whole number, got "16"',
        "optimizer.name: no optimizer is called 'adamv' (did you mean 'adamw'?)",
        "schedule.name: \"cosin\" is none of constant, linear and cosine (did you mean 'cosine'?)",
        "training.batchsize: unknown key (did you mean 'batch_size'?)",
        "training.epochs: must be >= 1: 0",
        "loggers[1].name: no logger is called 'terminl' (did you mean 'terminal'?)",
    ]
    with pytest.raises(RecipeError) as error:
        resolve_recipe(reference)
    assert set(error.value.problems) == set(expected)
    assert len(error.value.problems) == len(expected)
    done = cli("recipes", "validate", reference)
    assert done.status == 2
    assert done.out == ""
    assert done.err.splitlines()[0] == f"error: {reference}: {len(expected)} problems"
    assert [line.strip() for line in done.err.splitlines()[1:]] == list(error.value.problems)


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("adapter", {"rank": True}, "adapter.rank: expected a whole number, got true"),
        ("adapter", {"rank": 8.0}, "adapter.rank: expected a whole number, got 8.0"),
        ("adapter", {"rank": "8"}, 'adapter.rank: expected a whole number, got "8"'),
        ("adapter", {"rank": [8]}, "adapter.rank: expected a whole number, got [8]"),
        ("adapter", {"alpha": "16"}, 'adapter.alpha: expected a number, got "16"'),
        ("adapter", {"alpha": True}, "adapter.alpha: expected a number, got true"),
        ("adapter", {"dora": 1}, "adapter.dora: expected true or false, got 1"),
        ("adapter", {"dora": "yes"}, 'adapter.dora: expected true or false, got "yes"'),
        (
            "adapter",
            {"targets": 4},
            "adapter.targets: expected a string or a list of strings, got 4",
        ),
        (
            "adapter",
            {"targets": [1]},
            "adapter.targets: expected a string or a list of strings, got [1]",
        ),
        ("samples", {"prompts": "Why?"}, 'samples.prompts: expected a list of strings, got "Why?"'),
        ("optimizer", {"lr": 0.0}, "optimizer.lr: must be > 0.0: 0.0"),
        ("optimizer", {"lr": math.inf}, "optimizer.lr: expected a finite number, got inf"),
        ("optimizer", {"lr": math.nan}, "optimizer.lr: expected a finite number, got nan"),
        (
            "adapter",
            {"alpha_pattern": {"q_proj": math.inf}},
            "adapter.alpha_pattern.q_proj: expected a finite number, got inf",
        ),
        ("optimizer", {"lr": 10**400}, "optimizer.lr: expected a number, got 1000"),
        ("data", {"max_seq_len": 8.7}, "data.max_seq_len: expected a whole number, got 8.7"),
        (
            "data",
            {"too_long": "drp"},
            "data.too_long: \"drp\" is none of truncate, drop and error (did you mean 'drop'?)",
        ),
        ("training", {"epochs": {"n": 1}}, "training.epochs: expected a whole number, got a table"),
        ("data", {"name": 3}, "data.name: expected a string, got 3 (there is: "),
    ],
)
def test_wrong_value(section: str, values: Any, expected: str, problems_of: Any) -> None:
    (problem,) = problems_of(**{section: values})
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", True, "seed: expected a whole number, got true"),
        ("seed", -1, "seed: must be >= 0: -1"),
        ("seed", 2**32, "seed: must be <= 4294967295: 4294967296"),
        ("output", "", 'output: must not be empty: ""'),
        ("device", "gpu", "device: "),
        ("adapter", "lora", 'adapter: expected a table, {name = "..."}, got "lora"'),
        ("training", 3, "training: expected a table, got 3"),
        ("loggers", {"name": "disk"}, 'loggers: expected a list, [{name = "..."}], got a table'),
        ("loggers", ["disk"], 'loggers[0]: expected a table, {name = "..."}, got "disk"'),
        ("quantization", {}, "quantization.name: missing (there is: "),
    ],
)
def test_wrong_top_level_value(key: str, value: Any, expected: str, problems_of: Any) -> None:
    (problem,) = problems_of(**{key: value})
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("adapter.r", "adapter.r: unknown key (did you mean 'rank'?)"),
        ("adapter.lora_alpha", "adapter.lora_alpha: unknown key (did you mean 'alpha'?)"),
        ("adapter.lora_dropout", "adapter.lora_dropout: unknown key (did you mean 'dropout'?)"),
        ("adapter.target_modules", "adapter.target_modules: unknown key (did you mean 'targets'?)"),
        (
            "training.learning_rate",
            "training.learning_rate: unknown key (did you mean 'optimizer.lr'?)",
        ),
        ("output_dir", "output_dir: unknown key (did you mean 'output'?)"),
        ("epochs", "epochs: unknown key (did you mean 'training.epochs'?)"),
    ],
)
def test_another_trainers_name_for_a_key(key: str, expected: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError) as error:
        resolve_recipe(make_recipe(), overrides={key: 1})
    assert error.value.problems == (expected,)


def test_what_other_trainers_call_a_key_is_one_of_ours() -> None:
    """With the plugins that these tests have installed."""
    table = resolve_recipe("quickstart", overrides={"evaluation.fraction": 0.1}).table()
    for theirs, full in OURS.items():
        section, _, name = full.rpartition(".")
        if section not in ("quantization", ""):
            assert name in table[section], theirs


@frozen
class Numbers:
    """Options of which one is one of several numbers."""

    size: int = field(default=64, validator=in_((32, 64, 128, 2048)))


def test_a_number_is_near_by_its_value() -> None:
    _, (problem,) = structure(Numbers, {"size": 50}, "any")
    assert problem == "any.size: 50 is none of 32, 64, 128 and 2048 (did you mean 64?)"


@pytest.mark.parametrize(
    "section", ["model", "adapter", "optimizer", "precision", "data", "checkpointer"]
)
def test_unknown_plugin_name_lists_what_there_is(section: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError) as error:
        resolve_recipe(make_recipe(), overrides={f"{section}.name": "zzzz"})
    (problem,) = error.value.problems
    assert problem.startswith(f"{section}.name: no ")
    assert "'zzzz' (there is: " in problem


@pytest.mark.parametrize(
    ("key", "value"), [("checkpointer.save_merged", False), ("adapter.rank", 3)]
)
def test_a_section_without_a_name_is_the_default_ones(key: str, value: Any, write: Any) -> None:
    sections = 'output = "x"\nmodel = {name = "llama", path = "."}\n'
    rows = 'data = {name = "messages", path = "lorakit:about_lorakit.jsonl"}\n'
    file = write(f"[mine]\n{sections}{rows}")
    found = resolve_recipe(f"{file}:mine", overrides={key: value})
    section, _, option = key.partition(".")
    usual = resolve_recipe(f"{file}:mine")
    assert getattr(found, section).name == getattr(usual, section).name
    assert getattr(getattr(found, section).options, option) == value


def test_missing_sections(write: Any) -> None:
    with pytest.raises(RecipeError) as error:
        resolve_recipe(f"{write('[mine]')}:mine")
    assert sorted(p.partition(":")[0] for p in error.value.problems) == ["data", "model", "output"]
    assert all(": missing, expected " in p for p in error.value.problems)


def test_paths_are_reported_beside_other_problems(problems_of: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    found = problems_of(
        model="./nowhere/model",
        data={"path": str(tmp_path / "row.jsonl"), "max_seq_len": "long"},
    )
    assert len(found) == 3
    assert f"data.path: no file {tmp_path / 'row.jsonl'} (did you mean 'rows.jsonl'?)" in found
    (unclaimed,) = [p for p in found if p.startswith("model.path: ")]
    assert '"./nowhere/model" is no directory or file here' in unclaimed


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("lorakit:about.jsonl", "data.path: lorakit ships no data file 'about.jsonl'"),
        (str(NO_DATA), f"data.path: directory {NO_DATA} holds no file ending in .jsonl, .json, "),
        (__file__, f"data.path: {__file__}: expected a file ending in .jsonl, .json, .csv or "),
    ],
)
def test_wrong_data_path(path: str, expected: str, problems_of: Any) -> None:
    (problem,) = problems_of(data={"path": path})
    assert problem.startswith(expected)


# The file itself.


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("[mine]\noutput = \n", "mine", "line 2"),
        ("[mine]\na = 1\na = 2\n", "mine", "line 3"),
        ("seed = 1\n[mine]\n", "mine", "'seed' stands outside of any recipe"),
        ("[mine]\n[other]\n", "mien", "no recipe 'mien' (did you mean 'mine'?)"),
        ("[mine]\n[other]\n", "zzz", "no recipe 'zzz' (there is: mine and other)"),
        ('[mine]\nextends = "a"\n[a]\nextends = "mine"', "mine", "circle: mine -> a -> mine"),
        ('[mine]\nextends = "mine"', "mine", "circle: mine -> mine"),
        ('[mine]\nextends = "bass"\n[base]', "mine", "mine.extends: no recipe 'bass' (did you"),
        ("[mine]\nextends = 3", "mine", "mine: extends: expected a recipe's name"),
    ],
)
def test_wrong_file(text: str, name: str, expected: str, write: Any, cli: Any) -> None:
    file = write(text)
    done = cli("recipes", "validate", f"{file}:{name}")
    assert done.status == 2
    assert done.err.startswith(f"error: {file}: ") or "extends: expected" in done.err
    assert expected in done.err


def test_no_file(cli: Any, write: Any) -> None:
    near = write("[mine]").with_name("mien.toml")
    done = cli("train", f"{near}:mine")
    assert done.status == 2
    assert f"no recipe file {near} (did you mean 'mine.toml'?)" in done.err


def test_extends_merges_tables_key_by_key(write: Any, checkpoint: Path) -> None:
    file = write(f"""
[grand]
output = "out"
model = {{name = "llama", path = "{checkpoint}"}}
data = {{name = "messages", path = "{SHIPPED}", max_seq_len = 64}}
adapter = {{name = "lora", rank = 2, targets = ["q_proj", "v_proj"]}}
loggers = [{{name = "terminal"}}, {{name = "disk"}}]
[parent]
extends = "grand"
adapter = {{rank = 4, alpha = 3}}
seed = 5
[mine]
extends = "parent"
seed = 6
loggers = [{{name = "disk"}}]
[mine.adapter]
targets = ["k_proj"]
""")
    recipe = resolve_recipe(f"{file}:mine", overrides={"adapter.alpha": 9, "training.epochs": 7})
    assert (recipe.adapter.options.rank, recipe.adapter.options.alpha) == (4, 9.0)
    assert recipe.adapter.options.targets == ("k_proj",)
    assert (recipe.run.seed, recipe.training.epochs) == (6, 7)
    assert [logger.name for logger in recipe.loggers] == ["disk"]
    assert recipe.data.options.max_seq_len == 64
    assert "extends" not in recipe.table()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.epochs=2", ("training.epochs", 2)),
        ("optimizer.lr=2e-4", ("optimizer.lr", 2e-4)),
        ("adapter.dora=true", ("adapter.dora", True)),
        ("device=cpu", ("device", "cpu")),
        ("device=cuda:1", ("device", "cuda:1")),
        ('device="cpu"', ("device", "cpu")),
        ("data.path=runs/a=b.jsonl", ("data.path", "runs/a=b.jsonl")),
        ("model.path=pypi:x==1/y#sha256=ab", ("model.path", "pypi:x==1/y#sha256=ab")),
        ('adapter.targets=["q_proj", "v_proj"]', ("adapter.targets", ["q_proj", "v_proj"])),
        ("adapter={rank = 2}", ("adapter", {"rank": 2})),
        ("summary=", ("summary", "")),
        (" seed = 3", ("seed", 3)),
    ],
)
def test_set(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["training.epochs", "=2", ".epochs=2", "a..b=2", "a b=2", "a.=1"])
def test_set_without_a_key(text: str, make_recipe: MakeRecipe, cli: Any) -> None:
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        parse_override(text)
    done = cli("train", make_recipe(), "--set", text)
    assert done.status == 2
    assert done.err.startswith(f"error: --set {text}: expected KEY=VALUE")


def test_a_number_of_thousands_of_digits_is_an_error_like_any_other() -> None:
    with pytest.raises(UserError, match=r"x\.toml: not valid TOML"):
        parse_recipes("x.toml", "[a]\nb = " + "1" * 5000)
