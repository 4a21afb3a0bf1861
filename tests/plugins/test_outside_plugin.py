"""A plugin from outside: built, installed beside lorakit in a fresh environment, and trained."""

from __future__ import annotations

import json
from pathlib import Path

from lorakit.testing.environments import Environment

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "docs" / "examples" / "lorakit-toy"


def test_the_example_is_two_files():
    files = [p for p in TOY.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sorted(p.name for p in files) == ["lorakit_toy.py", "pyproject.toml"]


def test_no_file_of_lorakit_knows_the_example():
    """What a third party could do, the example does: core has no place for it."""
    sources = [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    assert sources
    assert [p for p in sources if "lorakit_toy" in p.read_text(encoding="utf-8")] == []


def test_plugins_list_shows_it(toy_environment: Environment):
    done = toy_environment.run("lorakit", "plugins", "list", "--json")
    assert done.returncode == 0, done.stderr
    listed = {p["distribution"]: p for p in json.loads(done.stdout)["plugins"]}
    toy = listed["lorakit-toy"]
    assert (toy["name"], toy["version"], toy["status"]) == ("toy", "0.1.0", "loaded")
    assert [(p["kind"], p["name"]) for p in toy["provides"]] == [("model family", "toy")]


def test_it_trains(toy_environment: Environment):
    done = toy_environment.run("lorakit", "train", "recipes.toml:toy", "--output", "trained")
    assert done.returncode == 0, done.stderr
    told = "serve with vLLM: whether vLLM serves toy models is not known to lorakit\n"
    assert told in done.stdout
    run = toy_environment.path / "trained"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert "up_proj" in config["target_modules"]
    assert (run / "merged" / "model.safetensors").is_file()
    merged = toy_environment.run("lorakit", "generate", "trained/merged", "--prompt", "1?")
    adapted = toy_environment.run("lorakit", "generate", "trained", "--prompt", "1?")
    assert (merged.returncode, adapted.returncode) == (0, 0), merged.stderr + adapted.stderr
    assert merged.stdout == adapted.stdout


def test_without_the_plugin_the_recipe_says_who_would_build_it(
    toy_environment: Environment,
):
    done = toy_environment.run(
        "lorakit", "recipes", "validate", "recipes.toml:toy", LORAKIT_BLOCK="toy"
    )
    assert done.returncode == 2
    assert "model.name: no model family is called 'toy'" in done.stderr
    assert "lorakit-toy[toy], which is blocked: blocked by LORAKIT_BLOCK" in done.stderr
    assert "Traceback" not in done.stderr
