"""Commands that need no torch do not load it, and answer at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
from lorakit.cli import main
main(sys.argv[1:])
"""


def timed(arguments: list[str], folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    return time.perf_counter() - started, done


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "train --help",
        "generate --help",
        "eval --help",
        "plugins list",
        "recipes list",
        "recipes validate quickstart",
    ],
)
def test_fast_commands(command: str, tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        took, done = timed(command.split(), tmp_path)
        seconds.append(took)
        assert (done.returncode, done.stderr) == (0, "False\n")
        assert done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("adapter.rank=0", "adapter.rank: must be >= 1: 0"),
        ("evaluation.path=nowhere.jsonl", "evaluation.path: no file nowhere.jsonl"),
    ],
)
def test_a_wrong_recipe_is_told_without_torch(setting: str, said: str, tmp_path: Path) -> None:
    _, done = timed(["train", "quickstart", "--set", setting], tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.endswith("False\n")


def test_a_wrong_option_of_generate_is_told_without_torch(tmp_path: Path) -> None:
    for more, message in (
        (["--prompt", "a", "--top-k", "5"], "--top-k: nothing is drawn at temperature 0"),
        ([], "Missing option '--prompt'"),
    ):
        _, done = timed(["generate", "x", *more], tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.endswith("False\n")
