"""The commands in the guide to memory that show an estimate."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorakit.cli import app

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "memory.md"
COMMANDS = re.findall(r"^lorakit (estimate .*)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_they_work(command: str, make_recipe: Callable[..., str]):
    words = [w.replace("quickstart", make_recipe()) for w in shlex.split(command)]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
