"""Where the assistant's turns are in a rendered conversation.

No marker strings are known here.  A turn is what rendering one message more adds behind the
generation prompt; its content, which the template may trim or leave parts of out, is what changes
when another content is rendered in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from attrs import evolve, frozen

from lorakit.data.tokenizer import Tokenizer
from lorakit.protocols import Message

# Characters of the private use area: no text starts or ends with both.
_STAND_INS = ("\ue0f1", "\ue0f2")


@frozen
class Span:
    """An assistant's turn in the rendered text.

    Attributes:
        turn: Index of the message.
        start: The first character that the model generates.
        content_end: Behind the last character of the content.
        end: The turn ends here at the latest.
    """

    turn: int
    start: int
    content_end: int
    end: int


def assistant_spans(messages: Sequence[Message], text: str, tokenizer: Tokenizer) -> list[Span]:
    """The assistant's turns, in order.

    Args:
        messages: The conversation.
        text: As the template renders it.
        tokenizer: Has the template.

    Raises:
        ValueError: A turn cannot be told apart.
    """
    spans = []
    cursor = 0
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            spans.append(_span(messages, turn, text, cursor, tokenizer))
            cursor = spans[-1].content_end
    # A turn whose end is not known ends before the next one's content at the latest.
    limits = [span.start for span in spans[1:]] + [len(text)] * bool(spans)
    return [evolve(s, end=min(s.end, limit)) for s, limit in zip(spans, limits, strict=True)]


def _span(
    messages: Sequence[Message], turn: int, text: str, cursor: int, tokenizer: Tokenizer
) -> Span:
    """Some templates render a turn in another way once another follows it: they drop its
    reasoning, or end every conversation with an end-of-text.  The prefixes are then not the
    text's, and the turn is found by its content alone."""
    before = _prefix(messages[:turn], text, tokenizer, add_generation_prompt=True)
    after = _prefix(messages[: turn + 1], text, tokenizer, add_generation_prompt=False)
    low = cursor if before is None else before
    high = len(text) if after is None or after < low else after
    content = messages[turn].content.strip()
    if content and text.count(content, low, high) == 1:
        start = text.index(content, low, high)
        end = start + len(content)
    else:
        start, end = _replaced(messages, turn, text, tokenizer)
    if end < low or end > high:
        raise _not_apart(messages[turn])
    return Span(turn, max(start, low) if before is None else before, end, high)


def _prefix(
    messages: Sequence[Message], text: str, tokenizer: Tokenizer, *, add_generation_prompt: bool
) -> int | None:
    """The length of the rendered messages, if that is how `text` starts."""
    try:
        rendered = tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
    except ValueError:
        return None
    return len(rendered) if text.startswith(rendered) else None


def _replaced(
    messages: Sequence[Message], turn: int, text: str, tokenizer: Tokenizer
) -> tuple[int, int]:
    """The characters of `text` that depend on the turn's content."""
    message = messages[turn]
    others = []
    for stand_in in _STAND_INS:
        changed = [*messages[:turn], evolve(message, content=stand_in), *messages[turn + 1 :]]
        others.append(tokenizer.render(changed))
    if any(stand_in not in other for stand_in, other in zip(_STAND_INS, others, strict=True)):
        raise _not_apart(message)
    # Content that happens to start or end as one stand-in's surroundings do not is cut short by
    # the other.
    start = min(_common(text, other) for other in others)
    same_end = min(_common(text[::-1], other[::-1]) for other in others)
    return start, max(start, len(text) - same_end)


def _common(one: str, other: str) -> int:
    """How many characters both start with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _not_apart(message: Message) -> ValueError:
    return ValueError(
        "the chat template does not write an assistant's turn where it can be told apart: "
        f"{message.content[:60]!r}"
    )
