"""Ctrl-C and SIGTERM, whenever they come: one line, the right exit status, nothing half written."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit import assemble, base_model, merging, preview, trained
from lorakit.atomic import replaced_directory
from lorakit.chat import Chat
from lorakit.cli import adapters, main
from lorakit.estimate import rehearsal
from lorakit.interrupts import Terminated, signals_raised

SIGNALS = {
    signal.SIGINT: "lorakit: interrupted\n",
    signal.SIGTERM: "lorakit: terminated\n",
}
BEFORE = "lorakit: stopped before the first step was done; nothing was saved\n"
Cli = Callable[..., Any]


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def signal_in(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """`signal_in(module, "function")`: the signal comes when the function is called."""

    def arm(owner: Any, name: str) -> None:
        def signalled(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), number)
            time.sleep(5)
            raise AssertionError("the signal was not heard")

        monkeypatch.setattr(owner, name, signalled)

    return arm


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (assemble, "load_datasets"),
        (assemble, "load_weights"),
        (assemble, "apply_adapter"),
        (lorakit.recipes, "load_catalog"),
    ],
)
def test_train_before_the_first_step(
    owner: Any,
    name: str,
    number: int,
    cli: Cli,
    signal_in: Callable[[Any, str], None],
    make_recipe: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    reference = make_recipe()
    with monkeypatch.context():
        signal_in(owner, name)
        done = cli("train", reference, "--output", output)
    assert (done.status, done.err) == (128 + number, BEFORE)
    assert not output.exists()
    monkeypatch.undo()
    assert cli("train", reference, "--output", output).status == 0


def test_train_once_its_directory_is_written_to(
    number: int,
    cli: Cli,
    signal_in: Callable[[Any, str], None],
    make_recipe: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    reference = make_recipe()
    signal_in(lorakit.run, "train")
    # In the loop a first signal is waited for; just before it, it is not.
    monkeypatch.setattr(lorakit.run, "stop_on_signals", signals_raised)
    done = cli("train", reference, "--output", output)
    assert (done.status, done.err) == (128 + number, BEFORE)
    assert (output / "recipe.toml").exists()
    monkeypatch.undo()
    assert cli("train", reference, "--output", output).status == 0
    steps = (output / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == len({*steps})


COMMANDS: dict[str, tuple[Any, str, Callable[[str, Path, Path], list[object]]]] = {
    "merge": (merging, "_write_side_files", lambda _, run, out: ["merge", run, "--output", out]),
    "merge, opening": (base_model, "check_tensors", lambda _, run, out: ["merge", run, "--check"]),
    "estimate": (rehearsal, "load_weights", lambda reference, *_: ["estimate", reference]),
    "generate": (Chat, "ask", lambda _, run, __: ["generate", run, "--prompt", "a"]),
    "generate, loading": (
        trained,
        "load_weights",
        lambda _, run, __: ["generate", run, "--prompt", "a"],
    ),
    "eval": (trained, "evaluate", lambda _, run, __: ["eval", run, "--data", run]),
    "preview": (preview, "load_datasets", lambda reference, *_: ["preview", reference]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands(
    command: str,
    number: int,
    cli: Cli,
    signal_in: Callable[[Any, str], None],
    make_recipe: Callable[..., str],
    tmp_path: Path,
) -> None:
    reference = make_recipe()
    run = lorakit.train(reference, output=tmp_path / "run").output
    owner, name, arguments = COMMANDS[command]
    signal_in(owner, name)
    before = sorted(tmp_path.rglob("*"))
    done = cli(*arguments(reference, run, tmp_path / "merged"))
    assert (done.status, done.err) == (128 + number, SIGNALS[number])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_signal_in_an_import_waits_for_its_end(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "importing_signal.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(0.2)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "importing_signal", raising=False)

    def imported() -> None:
        assert importlib.import_module("importing_signal").whole
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt) as raised, signals_raised():
        imported()
    assert isinstance(raised.value, Terminated) == (number == signal.SIGTERM)
    assert sys.modules.pop("importing_signal").whole


def test_a_signal_where_exceptions_are_lost_is_raised_after(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Thing:
        pass

    def freed(_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)

    things = [Thing()]
    reference = weakref.ref(things[0], freed)

    def let_go() -> None:
        things.clear()
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt), signals_raised():
        let_go()
    assert reference() is None
    assert capsys.readouterr().err == ""


def test_the_handlers_are_put_back_and_an_ignored_signal_stays_ignored(number: int) -> None:
    before = signal.getsignal(number)
    with signals_raised():
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)
    try:
        with signals_raised():
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_directory_that_is_being_replaced_is_as_it_was(number: int, tmp_path: Path) -> None:
    place = tmp_path / "merged"
    place.mkdir()
    (place / "old").touch()

    def replace() -> None:
        with replaced_directory(place) as part:
            (part / "new").touch()
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt), signals_raised():
        replace()
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert [p.name for p in place.iterdir()] == ["old"]


@pytest.mark.slow
def test_a_process_that_is_starting(number: int, make_recipe: Callable[..., str]) -> None:
    """From outside, while it imports, loads or trains."""
    reference = make_recipe()
    for delay in (0.6, 1.5, 2.5):
        process = subprocess.Popen(
            [sys.executable, "-m", "lorakit", "estimate", reference],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(delay)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        # Before lorakit is there to hear it, it ends as any process does; or it was done already.
        assert process.returncode in (128 + number, -number, 0), errors
        if process.returncode == 128 + number:
            assert errors == SIGNALS[number]


def test_main_leaves_the_processs_own_handlers(cli: Cli) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(SystemExit):
        main(["--version"])
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("place", ["builtins.input", "lorakit.chat.Chat.ask"])
def test_a_chat_goes_on_after_ctrl_c_and_ends_at_sigterm(
    place: str,
    cli: Cli,
    make_recipe: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run = lorakit.train(make_recipe(), output=tmp_path / "run").output
    sent = iter([signal.SIGINT, signal.SIGTERM])

    def signalled(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), next(sent))
        time.sleep(5)

    monkeypatch.setattr("builtins.input", lambda _: "hello")
    monkeypatch.setattr(place, signalled)
    monkeypatch.setattr(adapters, "at_terminal", lambda: True)
    done = cli("generate", run)
    assert done.status == 128 + signal.SIGTERM
    assert done.err.endswith(SIGNALS[signal.SIGTERM])
    assert list(sent) == []
