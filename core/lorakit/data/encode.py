"""From an example to tokens, and to which of them are trained.

Trained are the assistant's own tokens and the one that ends its turn.  Which those are is read
off the rendered text, not off marker strings: the text is tokenized once, as a whole, and each
token belongs to the turn its first character lies in.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from attrs import evolve, frozen

from lorakit.data.tokenizer import Tokenizer
from lorakit.protocols import Conversation, Example, Message, Text


@frozen
class Encoded:
    """A tokenized example: ids `[T]` and, for each, whether it is trained."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def truncated(self, length: int) -> Encoded:
        return evolve(self, ids=self.ids[:length], trained=self.trained[:length])

    @property
    def targets(self) -> int:
        """Trained tokens that something comes before: the first has nothing to predict it."""
        return sum(self.trained[1:])


def encode_example(example: Example, tokenizer: Tokenizer, *, train_on_prompt: bool) -> Encoded:
    """Tokenizes one example.

    Raises:
        ValueError: The template refuses the conversation, or the assistant's turns cannot be
            found in what it renders.
    """
    if isinstance(example, Text):
        return _encode_text(example, tokenizer)
    return _encode_conversation(example, tokenizer, train_on_prompt)


def _encode_text(example: Text, tokenizer: Tokenizer) -> Encoded:
    ids = list(tokenizer.encode(example.text, special=True).ids)
    end = tokenizer.token_id("eos_token")
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
    return Encoded(tuple(ids), (True,) * len(ids))


def _encode_conversation(
    example: Conversation, tokenizer: Tokenizer, train_on_prompt: bool
) -> Encoded:
    text = tokenizer.render(example.messages)
    encoding = tokenizer.encode(text, special=False)
    if train_on_prompt:
        return Encoded(tuple(encoding.ids), (True,) * len(encoding.ids))
    trained = [False] * len(encoding.ids)
    for span in _assistant_spans(example.messages, text, tokenizer):
        for index in _span_tokens(span, encoding, tokenizer):
            trained[index] = True
    return Encoded(tuple(encoding.ids), tuple(trained))


@frozen
class _Span:
    """Characters of one assistant turn: where it starts, where its content ends at the latest
    known, and where the turn's last character is."""

    start: int
    content_end: int
    end: int


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" if message.trained is None else message.trained


def _assistant_spans(messages: Sequence[Message], text: str, tokenizer: Tokenizer) -> list[_Span]:
    spans = []
    cursor = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            cursor = _skip_content(message, text, cursor)
            continue
        span = _span_of(messages, index, text, cursor, tokenizer)
        cursor = span.content_end
        if _is_trained(message):
            spans.append(span)
    return spans


def _span_of(
    messages: Sequence[Message], index: int, text: str, cursor: int, tokenizer: Tokenizer
) -> _Span:
    """The turn is what rendering one message more adds behind the generation prompt.

    Some templates render a turn differently once another follows it (they drop its reasoning,
    or end every conversation with an end-of-text): as far as the prefixes differ from the whole,
    the turn is found by its content, in order.

    Raises:
        ValueError: The content is not there.
    """
    before = _prefix(messages[:index], text, tokenizer, add_generation_prompt=True)
    after = _prefix(messages[: index + 1], text, tokenizer, add_generation_prompt=False)
    known = before is not None and after is not None and after.startswith(before)
    end = len(after or "") if known else len(text)
    content = messages[index].content.strip()
    found = text.find(content, max(cursor, len(before or "")), end)
    if found < 0:
        raise ValueError(
            "the chat template does not write an assistant's turn as it is, so its tokens "
            f"cannot be told apart: {content[:60]!r}"
        )
    return _Span(found if before is None else len(before), found + len(content), end)


def _prefix(
    messages: Sequence[Message], text: str, tokenizer: Tokenizer, *, add_generation_prompt: bool
) -> str | None:
    """The rendered messages, if that is how `text` starts."""
    try:
        rendered = tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
    except ValueError:
        return None
    return rendered if text.startswith(rendered) else None


def _skip_content(message: Message, text: str, cursor: int) -> int:
    found = text.find(message.content.strip(), cursor)
    return cursor if found < 0 else found + len(message.content.strip())


def _span_tokens(span: _Span, encoding: tokenizers.Encoding, tokenizer: Tokenizer) -> list[int]:
    """Indices of the turn's tokens, up to and with the special token that ends it.

    What a template writes behind that token (a newline, usually) is not the model's to say.
    A turn that no special token ends is trained to the end of its content.
    """
    taken: list[int] = []
    content_only: list[int] = []
    for index, (start, end) in enumerate(encoding.offsets):
        if start < span.start or start >= span.end or start == end:
            continue
        taken.append(index)
        if start < span.content_end:
            content_only.append(index)
        elif _is_special(encoding.ids[index], tokenizer):
            return taken
    return content_only


def _is_special(token: int, tokenizer: Tokenizer) -> bool:
    added = tokenizer.backend.get_added_tokens_decoder().get(token)
    return token in tokenizer.stop_ids or (added is not None and added.special)
