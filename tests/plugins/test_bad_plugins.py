"""What goes wrong with plugins: each is named, and none stops a run that does not need it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorakit.testing.environments import Environment

FAMILY = """
from lorakit import hookimpl
from lorakit.options import ModelOptions
from lorakit.records import ModelFamily

@hookimpl
def lorakit_model_families():
    return [ModelFamily(name="alpha", summary="x", options=ModelOptions, model_types=("alpha",),
                        build=lambda config, options: None)]
"""

BROKEN = {
    "raises": ("raise RuntimeError('no such chip')\n", "RuntimeError: no such chip"),
    "lacks": ("import package_nobody_has\n", "No module named 'package_nobody_has'"),
    "exits": ("import sys\nsys.exit('bye')\n", "SystemExit: bye"),
    "syntax": ("def (:\n", "SyntaxError"),
    "hook": (
        FAMILY.replace("return [", "raise OSError('disk on fire')\n    return ["),
        "OSError: disk on fire",
    ),
    "unmarked": (
        FAMILY.replace("@hookimpl\n", ""),
        "lorakit_model_families lacks the @lorakit.hookimpl decorator",
    ),
    "misspelt": (
        FAMILY.replace("def lorakit_model_families", "def lorakit_model_familys"),
        "lorakit_model_familys",
    ),
    "arguments": (
        FAMILY.replace("families()", "families(registry)"),
        "registry",
    ),
    "record": (
        FAMILY.replace("return [", "return ['alpha'] or ["),
        "expected lorakit.records.ModelFamily",
    ),
    "nothing": (FAMILY.replace("return [", "[") + "    return None\n", "TypeError"),
    "keyword": (FAMILY.replace("summary=", "sumary="), "sumary"),
}


def listed(environment: Environment, **variables: str) -> dict[str, Any]:
    done = environment.run("lorakit", "plugins", "list", "--json", **variables)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return {p["distribution"]: p for p in json.loads(done.stdout)["plugins"]}


def write_recipe(environment: Environment, family: str) -> None:
    (environment.path / "m").mkdir(exist_ok=True)
    (environment.path / "recipes.toml").write_text(
        f'[r]\noutput = "run"\nmodel = {{name = "{family}", path = "m"}}\n'
        'data = {name = "messages", path = "lorakit:about_lorakit.jsonl"}\n',
        encoding="utf-8",
    )


def validate(environment: Environment, family: str, **variables: str) -> tuple[int, str]:
    write_recipe(environment, family)
    done = environment.run("lorakit", "recipes", "validate", "recipes.toml:r", **variables)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_stops_nothing_else(case: str, environment: Environment):
    source, reason = BROKEN[case]
    environment.plant("lorakit-alpha", source)

    plugin = listed(environment)["lorakit-alpha"]
    assert plugin["status"] == "broken"
    assert reason in plugin["reason"]
    assert plugin["provides"] == []
    assert listed(environment)["lorakit"]["status"] == "loaded"

    # A recipe that does not name it is not concerned; one that does is told why it cannot.
    assert validate(environment, "llama") == (0, "")
    status, message = validate(environment, "alpha")
    assert status == 2
    assert "lorakit-alpha[alpha], which is broken" in message
    assert reason in message


def test_the_plain_list_shows_a_broken_plugin(environment: Environment):
    environment.plant("lorakit-alpha", "raise RuntimeError('no such chip')\n")
    done = environment.run("lorakit", "plugins", "list")
    assert "lorakit-alpha 1.0  [alpha]  BROKEN: RuntimeError: no such chip" in done.stdout


def test_a_broken_plugin_under_another_name_may_be_the_one(environment: Environment):
    """Nothing says what a plugin that cannot be imported would have offered."""
    environment.plant("lorakit-greek", "raise RuntimeError('no such chip')\n")
    status, message = validate(environment, "alpha")
    assert status == 2
    assert "lorakit-greek[greek] (broken: RuntimeError: no such chip)" in message


def test_a_name_offered_twice(environment: Environment):
    environment.plant("lorakit-one", FAMILY)
    environment.plant("lorakit-two", FAMILY, version="2.5")

    status, message = validate(environment, "alpha")
    assert status == 2
    assert "lorakit-one[one] 1.0" in message
    assert "lorakit-two[two] 2.5" in message

    assert validate(environment, "llama") == (0, "")
    assert validate(environment, "alpha", LORAKIT_BLOCK="two") == (0, "")
    done = environment.run("lorakit", "plugins", "list")
    assert done.stdout.count("CLASH: also offered by") == 2


def test_a_clash_with_a_built_in_name_is_the_same(environment: Environment):
    clash = (
        "from lorakit import hookimpl\nfrom lorakit.records import LoggerType\n@hookimpl\n"
        "def lorakit_loggers():\n"
        "    return [LoggerType(name='disk', summary='x', open=None)]\n"
    )
    environment.plant("lorakit-alpha", clash)
    write_recipe(environment, "llama")
    with (environment.path / "recipes.toml").open("a", encoding="utf-8") as file:
        file.write('loggers = [{name = "disk"}]\n')
    done = environment.run("lorakit", "recipes", "validate", "recipes.toml:r")
    assert done.returncode == 2
    assert "lorakit-alpha[alpha] 1.0" in done.stderr
    assert "lorakit[builtin]" in done.stderr


@pytest.mark.parametrize("name", ["alpha", "lorakit-alpha", "other, alpha"])
def test_blocked_plugins_are_not_imported(name: str, environment: Environment):
    environment.plant("lorakit-alpha", "raise RuntimeError('imported')\n")
    plugin = listed(environment, LORAKIT_BLOCK=name)["lorakit-alpha"]
    assert plugin["status"] == "blocked"
    assert plugin["reason"] == "blocked by LORAKIT_BLOCK"


def test_one_distribution_may_have_more_than_one_plugin(environment: Environment):
    environment.plant("lorakit-alpha", FAMILY)
    info = environment.packages / "lorakit_alpha-1.0.dist-info" / "entry_points.txt"
    info.write_text("[lorakit]\nalpha = lorakit_alpha\nbeta = lorakit_beta\n", encoding="utf-8")
    (environment.packages / "lorakit_beta.py").write_text("raise OSError('x')\n", encoding="utf-8")
    done = environment.run("lorakit", "plugins", "list", "--json")
    found = [p for p in json.loads(done.stdout)["plugins"] if p["distribution"] == "lorakit-alpha"]
    assert [(p["name"], p["status"]) for p in found] == [("alpha", "loaded"), ("beta", "broken")]


def test_lorakit_alone_says_which_plugins_there_are(environment: Environment):
    done = environment.run("lorakit", "plugins", "list", LORAKIT_BLOCK="llama,gguf")
    assert done.returncode == 0
    assert "lorakit-llama 0.1.0  [llama]  BLOCKED: blocked by LORAKIT_BLOCK" in done.stdout
