"""The terminal's side of `lorakit generate` without a prompt."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING

import click

from lorakit.errors import UserError
from lorakit.interrupts import Terminated

if TYPE_CHECKING:
    from lorakit.chat import Answer, Chat

_HINT = "Ctrl-C stops an answer, /reset forgets the chat, /exit or Ctrl-D ends it."
_ALONE = "The model has no chat template: it continues each prompt by itself, and keeps none."


def at_terminal() -> bool:
    """Whether somebody can read and write here."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def show_piece(piece: str) -> None:
    click.echo(piece, nl=False)


def warn(notice: str) -> None:
    click.echo(f"warning: {notice}", err=True)


def tell_if_cut(answer: Answer) -> None:
    """Says that an answer would have gone on."""
    from lorakit.chat import LENGTH

    if answer.stopped == LENGTH:
        click.echo(f"(stopped at --max-new-tokens {answer.tokens})", err=True)


def converse(chat: Chat) -> None:
    """Reads prompts and streams their answers until Ctrl-D or `/exit`."""
    with contextlib.suppress(ImportError):
        # What input() then has: editing, and the lines before.
        import readline  # noqa: F401
    click.echo(_HINT if chat.tokenizer.template is not None else f"{_ALONE}\n{_HINT}", err=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo()
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            click.echo()
            continue
        except UnicodeDecodeError:
            click.echo("error: that is not UTF-8", err=True)
            continue
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            chat.reset()
            click.echo("(forgotten)", err=True)
        elif re.fullmatch(r"/\w*", command):
            click.echo(f"error: no command {command!r}. {_HINT}", err=True)
        elif command:
            _answer(chat, line)


def _answer(chat: Chat, prompt: str) -> None:
    try:
        answer = chat.ask(prompt, show_piece, warn)
    except Terminated:
        raise
    except KeyboardInterrupt:
        click.echo()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
    else:
        click.echo()
        tell_if_cut(answer)
