"""Arguments that are wrong: one message that names what may be given, and status 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Cli = Callable[..., Any]


def message_of(done: Any) -> str:
    """What a command that refused its input said."""
    assert done.status == 2, done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    return str(done.err.removeprefix("error: ").rstrip())


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x", "--prompt", "a"),
        ("eval", "x", "--data", "a.jsonl"),
        ("merge", "x", "--output", "out"),
    ],
)
def test_a_device_that_nobody_has(command: tuple[str, ...], cli: Cli) -> None:
    known = "is none of auto, cpu, mps, cuda and cuda:N"
    for name in ("xyz", "cpu:1", "cuda:", "cuda:x"):
        assert message_of(cli(*command, "--device", name)) == f'--device: "{name}" {known}'
    message = message_of(cli(*command, "--device", "gpu"))
    assert message == f"--device: \"gpu\" {known} (did you mean 'cuda'?)"
    assert "has no cuda:3000" in message_of(cli(*command, "--device", "cuda:3000"))


def test_a_recipes_device(make_recipe: Callable[..., str], cli: Cli) -> None:
    message = message_of(cli("train", make_recipe(device="xyz")))
    assert 'device: "xyz" is none of auto, cpu, mps, cuda and cuda:N' in message
