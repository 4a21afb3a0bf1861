"""`lorakit generate` without a prompt: a chat in a terminal, a stand-in's and a real one."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.chat import LENGTH, Chat
from lorakit.generation import GREEDY
from lorakit.trained import load_trained

Cli = Callable[..., Any]
SYSTEM = "Be brief."


def silent(_: str) -> None:
    pass


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def chat(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """`chat(typed, path, ...)` -> what a chat in a terminal ended with."""

    def run(typed: str, *arguments: object) -> Any:
        monkeypatch.setattr("sys.stdin", Terminal(typed))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return cli("generate", *arguments)

    return run


def test_a_chat_at_a_terminal(chat: Callable[..., Any], checkpoint: Path, cli: Cli) -> None:
    trained = load_trained(str(checkpoint), "cpu")
    reference = Chat(trained.model, trained.tokenizer, GREEDY, max_new_tokens=16, system=SYSTEM)
    first, second = (reference.ask(p, silent, silent).text for p in ("Say tokens", "Say a row"))
    reference.reset()
    alone = reference.ask("Say a row", silent, silent).text
    assert alone != second
    typed = "Say tokens\nSay a row\n\n/reset\nSay a row\n/exit\nnever read\n"
    done = chat(typed, checkpoint, "--max-new-tokens", 16, "--system", SYSTEM)
    assert done.status == 0, done.err
    assert done.out == f"> {first}\n> {second}\n> > > {alone}\n> "
    assert "/exit or Ctrl-D ends it" in done.err
    assert done.err.count("(forgotten)") == 1


def test_commands_that_there_are_not(chat: Callable[..., Any], checkpoint: Path) -> None:
    done = chat("/quit\n/\n", checkpoint, "--max-new-tokens", 1)
    assert done.status == 0
    assert "error: no command '/quit'. Ctrl-C stops an answer" in done.err
    assert done.out == "> > > \n"


def test_an_error_ends_a_turn_and_not_the_chat(
    chat: Callable[..., Any], with_template: Callable[..., Path]
) -> None:
    template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    done = chat("what?\nwhat?\n/reset\nwhat?\n", with_template(template), "--max-new-tokens", 2)
    assert done.status == 0
    assert done.err.count("error: the chat template refuses it: one turn") == 1
    assert done.err.count("(stopped at --max-new-tokens 2)") == 2


def test_without_a_template_prompts_stand_alone(
    chat: Callable[..., Any], with_template: Callable[..., Path], cli: Cli
) -> None:
    path = with_template(None)
    answers = [
        cli("generate", path, "--prompt", prompt, "--max-new-tokens", 5).out
        for prompt in ("the model", "a row")
    ]
    done = chat("the model\na row\n", path, "--max-new-tokens", 5)
    assert done.out == f"> {answers[0]}> {answers[1]}> \n"
    assert "The model has no chat template: it continues each prompt by itself" in done.err


def test_a_chat_needs_a_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what?"))
    done = cli("generate", "x")
    assert done.status == 2
    assert "Missing option '--prompt': a chat needs a terminal." in done.err


def test_json_is_of_one_answer(chat: Callable[..., Any]) -> None:
    done = chat("what?\n", "x", "--json")
    assert done.status == 2
    assert "Missing option '--prompt': --json is of one answer." in done.err


class Pseudoterminal:
    """A command with a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "lorakit", *arguments])

    def until(self, text: str, seconds: float = 120) -> str:
        """What it writes, up to and with `text`."""
        seen = b""
        end = time.monotonic() + seconds
        while text.encode() not in seen:
            assert time.monotonic() < end, seen
            if select.select([self.terminal], [], [], 0.1)[0]:
                seen += os.read(self.terminal, 1)
        return seen.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def status(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < end, "still running"
            if select.select([self.terminal], [], [], 0.1)[0]:
                try:
                    os.read(self.terminal, 1024)
                except OSError:  # Its end, on Linux.
                    time.sleep(0.05)


@pytest.fixture
def pseudoterminal() -> Iterator[Callable[..., Pseudoterminal]]:
    opened: list[Pseudoterminal] = []

    def start(*arguments: str) -> Pseudoterminal:
        opened.append(Pseudoterminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        os.close(one.terminal)
        try:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def endless_prompt(checkpoint: Path) -> str:
    """One that the random model falls into a loop at, without what the test waits for."""
    trained = load_trained(str(checkpoint), "cpu")
    for prompt in ("the model", "a row", "tokens", "one step", "weights", "an answer"):
        chat = Chat(trained.model, trained.tokenizer, GREEDY, max_new_tokens=150)
        answer = chat.ask(prompt, silent, silent)
        if answer.stopped == LENGTH and ">" not in answer.text:
            return prompt
    raise AssertionError("there is none")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudoterminals")
def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(
    pseudoterminal: Callable[..., Pseudoterminal], checkpoint: Path
) -> None:
    endless = endless_prompt(checkpoint)
    command = ["generate", str(checkpoint), "--max-new-tokens", "1000000"]
    shell = pseudoterminal(*command)
    shell.until("> ")
    # Python's readline sees a signal only once it waits for keys.
    time.sleep(0.5)
    shell.type("\x03")
    shell.until("\n> ")
    for _ in range(2):
        shell.type(f"{endless}\n")
        shell.until(f"{endless}\r\n")
        # The answer is under way.
        os.read(shell.terminal, 1)
        shell.type("\x03")
        shell.until("\n> ")
        shell.type("/reset\n")
        shell.until("(forgotten)")
        shell.until("> ")
    shell.type("\x04")
    assert shell.status() == 0
