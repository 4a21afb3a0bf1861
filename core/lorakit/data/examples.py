"""What a data set format makes of a row, and which other format a row would fit.  Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.catalog import Catalog
from lorakit.errors import LorakitError, UserError
from lorakit.plugins import explain
from lorakit.protocols import Conversation, Example, Message, Text
from lorakit.records import DatasetFormat


def make_example(form: DatasetFormat, row: Mapping[str, Any], options: Any, where: str) -> Example:
    """The row as the format reads it.

    Args:
        form: The format.
        row: Its values by key.
        options: The format's own.
        where: The row's place, for messages.

    Raises:
        ValueError: The row is wrong.
        UserError: The format is: it raises something else, or returns what is no example.
    """
    try:
        example = form.example(row, options)
    except (ValueError, LorakitError):
        raise
    # A plugin's own mistake, whatever it is; the row may be right.
    except Exception as error:
        raise _at_fault(form, where, f"raises {explain(error)}, expected a ValueError") from None
    wrong = type_problem(example)
    if wrong:
        raise _at_fault(form, where, wrong)
    return example


def type_problem(example: Any) -> str:
    """What is wrong with the types of what a format returned, a sentence's end; empty if
    nothing is."""
    if isinstance(example, Text):
        return _not_a(example.text, str, "Text.text")
    if not isinstance(example, Conversation):
        return _not_a(example, (Conversation, Text), "an example")
    messages: Any = example.messages
    if not isinstance(messages, (tuple, list)):
        return _not_a(messages, tuple, "Conversation.messages")
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        wrong = _not_a(message, Message, place)
        wrong = wrong or _not_a(message.role, str, f"{place}.role")
        wrong = wrong or _not_a(message.content, str, f"{place}.content")
        wrong = wrong or _not_a(message.extra, Mapping, f"{place}.extra")
        if wrong:
            return wrong
    return ""


def other_formats(row: Mapping[str, Any], used: DatasetFormat, catalog: Catalog) -> list[str]:
    """The names of the other formats that read the row as it is."""
    return [r.name for r in catalog.all("dataset") if r is not used and _reads(r, row)]


def _reads(form: DatasetFormat, row: Mapping[str, Any]) -> bool:
    # The formats are asked on suspicion: whatever goes wrong, this one does not fit.
    try:
        return not type_problem(form.example(row, form.options(path="rows.jsonl")))
    except Exception:
        return False


def _not_a(value: Any, kind: type[Any] | tuple[type[Any], ...], place: str) -> str:
    if isinstance(value, kind):
        return ""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(
        f"lorakit.protocols.{k.__name__}" if k.__module__ == Text.__module__ else k.__name__
        for k in kinds
    )
    return f"returns {type(value).__name__} as {place}, expected {expected}"


def _at_fault(form: DatasetFormat, where: str, what: str) -> UserError:
    return UserError(
        f"data.name: the plugin of {form.name!r} is wrong, not the data: its example {what} "
        f"({where})",
        "Tell its author: docs/reference/plugins.md says what lorakit_datasets returns.",
    )
