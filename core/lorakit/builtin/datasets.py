"""Chat, instruction and plain-text rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from lorakit.errors import did_you_mean, listing
from lorakit.options import DataOptions, not_empty
from lorakit.protocols import Conversation, Message, Text

ROLES = ("system", "user", "assistant", "tool")


@frozen(kw_only=True)
class MessagesOptions(DataOptions):
    """`[data]` with `name = "messages"`.

    Attributes:
        column: The row's key that holds the list of `{role, content}`.
    """

    column: str = field(default="messages", validator=not_empty)


@frozen(kw_only=True)
class AlpacaOptions(DataOptions):
    """`[data]` with `name = "alpaca"`: rows of `instruction`, `input` (optional), `output`."""


@frozen(kw_only=True)
class TextOptions(DataOptions):
    """`[data]` with `name = "text"`.

    Attributes:
        column: The row's key that holds the text.
    """

    column: str = field(default="text", validator=not_empty)


def messages_example(row: Mapping[str, Any], options: MessagesOptions) -> Conversation:
    """`{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}`; a turn
    may say `"train": false`.  What else it has (`name`, `reasoning_content`, `tool_calls` ...) is
    for the chat template to see.

    Raises:
        ValueError: The row has another shape.
    """
    turns = _value(row, options.column)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{options.column}: expected a list of messages, got {_shown(turns)}")
    return Conversation(tuple(_message(t, f"{options.column}[{i}]") for i, t in enumerate(turns)))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}: expected {{role, content}}, got {_shown(turn)}")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        raise ValueError(f"{where}.role: {_shown(role)} is none of {listing(ROLES)}{hint}")
    if not isinstance(content, str):
        raise ValueError(f"{where}.content: expected a string, got {_shown(content)}")
    trained = turn.get("train")
    if trained is not None and not isinstance(trained, bool):
        raise ValueError(f"{where}.train: expected true or false, got {_shown(trained)}")
    if trained and role != "assistant":
        raise ValueError(f"{where}.train: only an assistant's turn can be trained")
    extra = {k: v for k, v in turn.items() if k not in ("role", "content", "train")}
    return Message(role, content, trained, extra)


def alpaca_example(row: Mapping[str, Any], options: AlpacaOptions) -> Conversation:
    """The instruction, with the input behind an empty line, as the user's turn; the output as
    the assistant's.

    Raises:
        ValueError: The row has another shape.
    """
    instruction, output = _string(row, "instruction"), _string(row, "output")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise ValueError(f"input: expected a string, got {_shown(extra)}")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return Conversation((Message("user", question), Message("assistant", output)))


def text_example(row: Mapping[str, Any], options: TextOptions) -> Text:
    """`{"text": ...}`.

    Raises:
        ValueError: The row has another shape.
    """
    return Text(_string(row, options.column))


def _string(row: Mapping[str, Any], key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected a string, got {_shown(value)}")
    return value


def _value(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        hint = did_you_mean(key, row)
        raise ValueError(f"no key {key!r}{hint}; the row has {listing(row, none='no keys')}")
    return row[key]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
