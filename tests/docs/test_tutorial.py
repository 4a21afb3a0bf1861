"""The tutorial is what a third party does: its files are the example's, its commands run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lorakit.testing.environments import Environment

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "docs" / "examples" / "lorakit-toy"
FILES = dict(re.findall(r"```\w+ file=(\S+)\n(.*?)```", TUTORIAL, re.DOTALL))
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", TUTORIAL, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("name", ["pyproject.toml", "lorakit_toy.py"])
def test_its_files_are_the_examples(name: str):
    assert FILES[name] == (EXAMPLE / name).read_text(encoding="utf-8")


def test_every_block_is_a_file_a_command_or_output():
    languages = re.findall(r"^```(\w+.*)$", TUTORIAL, re.MULTILINE)
    assert all(re.fullmatch(r"console|text|\w+ file=\S+", language) for language in languages)


def test_a_third_party_can_do_all_of_it(tmp_path: Path):
    environment = Environment.create(tmp_path / "environment")
    package = environment.path / "lorakit-toy"
    package.mkdir()
    for name, content in FILES.items():
        inside = name in ("pyproject.toml", "lorakit_toy.py")
        (package if inside else environment.path).joinpath(name).write_text(content)
    printed = {}
    for command in COMMANDS:
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            # The build backend is in this environment already: nothing is downloaded.
            words[2:2] = ["--no-build-isolation", "--no-deps", "--no-index"]
            words = ["python", "-m", *words]
        done = environment.run(*words)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command] = done.stdout
    (listed,) = re.findall(r"```text\n(.*?)```", TUTORIAL, re.DOTALL)
    assert listed in printed["lorakit plugins list"]
    assert (environment.path / "runs" / "toy" / "merged" / "config.json").is_file()
    assert (environment.path / "runs" / "toy" / "adapter" / "adapter_config.json").is_file()
