"""The command line, called in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture
def with_template(checkpoint: Path, tmp_path: Path) -> Callable[[str | None], Path]:
    """The random model with another chat template, or none."""

    def make(template: str | None) -> Path:
        folder = tmp_path / "other-template"
        shutil.copytree(checkpoint, folder)
        file = folder / "tokenizer_config.json"
        config = {**json.loads(file.read_text()), "chat_template": template}
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return make
