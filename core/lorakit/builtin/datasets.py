"""Chat, instruction and plain-text rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from lorakit.errors import did_you_mean, listing
from lorakit.options import DataOptions, not_empty
from lorakit.protocols import Conversation, Message, Text

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from`, with the words that later data sets brought in, and the role of each."""


@frozen(kw_only=True)
class MessagesOptions(DataOptions):
    """`[data]` with `name = "messages"`.

    Attributes:
        column: The row's key that holds the list of `{role, content}`.
    """

    column: str = field(default="messages", validator=not_empty)


@frozen(kw_only=True)
class ShareGPTOptions(DataOptions):
    """`[data]` with `name = "sharegpt"`.

    Attributes:
        column: The row's key that holds the list of `{from, value}`.
    """

    column: str = field(default="conversations", validator=not_empty)


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
    turns = _turns(row, options.column)
    return Conversation(tuple(_message(t, f"{options.column}[{i}]") for i, t in enumerate(turns)))


def sharegpt_example(row: Mapping[str, Any], options: ShareGPTOptions) -> Conversation:
    """`{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}`; a turn may
    say `"train": false`, as in `messages`.

    Raises:
        ValueError: The row has another shape.
    """
    turns = _turns(row, options.column)
    return Conversation(tuple(_spoken(t, f"{options.column}[{i}]") for i, t in enumerate(turns)))


def _turns(row: Mapping[str, Any], column: str) -> list[Any]:
    turns = _value(row, column)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{column}: expected a list of messages, got {_shown(turns)}")
    return turns


def _spoken(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}: expected {{from, value}}, got {_shown(turn)}")
    if "from" not in turn and "role" in turn:
        raise ValueError(
            f"{where}: expected {{from, value}}, got {{role, content}}, which is the format "
            f"messages with column = {where.partition('[')[0]!r}"
        )
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        hint = did_you_mean(str(speaker), SHAREGPT_ROLES)
        known = listing(SHAREGPT_ROLES)
        raise ValueError(f"{where}.from: {_shown(speaker)} is none of {known}{hint}")
    others = {k: v for k, v in turn.items() if k not in ("from", "value")}
    return _checked(SHAREGPT_ROLES[speaker], turn.get("value"), others, where, "value")


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}: expected {{role, content}}, got {_shown(turn)}")
    role = turn.get("role")
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        raise ValueError(f"{where}.role: {_shown(role)} is none of {listing(ROLES)}{hint}")
    others = {k: v for k, v in turn.items() if k not in ("role", "content")}
    return _checked(role, turn.get("content"), others, where, "content")


def _checked(
    role: str, content: Any, others: Mapping[str, Any], where: str, content_key: str
) -> Message:
    """The turn, whose role is known to be one, and `others` what else it has."""
    if not isinstance(content, str):
        raise ValueError(f"{where}.{content_key}: expected a string, got {_shown(content)}")
    trained = others.get("train")
    if trained is not None and not isinstance(trained, bool):
        raise ValueError(f"{where}.train: expected true or false, got {_shown(trained)}")
    if trained and role != "assistant":
        raise ValueError(f"{where}.train: only an assistant's turn can be trained")
    return Message(role, content, trained, {k: v for k, v in others.items() if k != "train"})


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
