"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import frozen

from lorakit.cli import main


@frozen
class Done:
    """What a command ended with."""

    status: object
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`cli("train", reference)` -> its exit status, stdout and stderr."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return Done(exited.value.code, written.out, written.err)

    return run
