"""Any number of loggers at once, none of which can stop a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.logs import LoggerGroup
from lorakit.options import NoOptions
from lorakit.protocols import RunInfo
from lorakit.recipes import Section
from lorakit.records import LoggerType

CALLS = ("start", "metrics", "notice", "finish")


class Recorder:
    def __init__(self, failing: str = "", error: BaseException | None = None):
        self.calls: list[str] = []
        self._failing, self._error = failing, error

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self._failing and self._error is not None:
            raise self._error

    def start(self, run: Any) -> None:
        self._note("start")

    def metrics(self, values: Any) -> None:
        self._note("metrics")

    def notice(self, text: str) -> None:
        self._note("notice")

    def finish(self) -> None:
        self._note("finish")


def section(name: str, opener: Callable[..., Any]) -> Section:
    return Section(LoggerType(name=name, summary=name, open=opener), NoOptions())


def go_through(group: LoggerGroup, info: RunInfo) -> None:
    with group as log:
        log.start(info)
        for step in (1, 2):
            log.metrics({"step": step})
            log.notice("so far")


@pytest.mark.parametrize("failing", CALLS)
@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit("bye")])
def test_one_that_fails_is_named_once_and_closed(
    failing: str,
    error: BaseException,
    run_info: Callable[..., RunInfo],
    capsys: pytest.CaptureFixture[str],
):
    bad, good = Recorder(failing, error), Recorder()
    sections = [section("bad", lambda *_: bad), section("good", lambda *_: good)]
    go_through(LoggerGroup.open(sections, Path()), run_info())
    assert good.calls == ["start", *["metrics", "notice"] * 2, "finish"]
    assert bad.calls.count(failing) == (2 if failing == "finish" else 1)
    assert bad.calls[-1] == "finish"
    assert capsys.readouterr().err.count("logger 'bad' failed") == 1


def test_one_that_cannot_be_opened_is_left_out(
    run_info: Callable[..., RunInfo], capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: Any) -> Any:
        raise ImportError("no such client")

    good = Recorder()
    sections = [section("bad", refuse), section("good", lambda *_: good)]
    go_through(LoggerGroup.open(sections, Path()), run_info())
    assert good.calls[-1] == "finish"
    assert "logger 'bad' failed and is left out from here: ImportError: no such client" in (
        capsys.readouterr().err
    )


def test_a_user_who_interrupts_is_heard(run_info: Callable[..., RunInfo]):
    bad = Recorder("metrics", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go_through(LoggerGroup.open([section("bad", lambda *_: bad)], Path()), run_info())


def test_the_same_logger_may_be_there_twice(train_run: Callable[..., Path], tmp_path: Path):
    places = [tmp_path / "a", tmp_path / "b"]
    train_run(
        loggers=[{"name": "tensorboard", "log_dir": str(p)} for p in places],
        training={"max_steps": 1},
    )
    assert all(len(list(place.iterdir())) == 1 for place in places)
