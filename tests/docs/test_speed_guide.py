"""The commands of the guide to speed are valid, and its files and keys are the run's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import attrs

from lorakit.options import TrainingOptions
from lorakit.recipes import parse_override, resolve_recipe
from lorakit.run_directory import PROFILE

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "how-to" / "speed.md").read_text(encoding="utf-8")


def test_its_command_resolves(monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    _, verb, reference, flag, setting = shlex.split(block)
    assert (verb, flag) == ("train", "--set")
    recipe = resolve_recipe(reference, overrides=dict([parse_override(setting)]))
    assert recipe.training.profile


def test_it_names_what_there_is():
    keys = {field.name for field in attrs.fields(TrainingOptions)}
    named = set(re.findall(r"training\.(\w+)", GUIDE))
    assert named
    assert named <= keys
    assert {f"{PROFILE}/trace.json", f"{PROFILE}/operations.txt"} <= set(
        re.findall(r"`(profile/[\w.]+)`", GUIDE)
    )
