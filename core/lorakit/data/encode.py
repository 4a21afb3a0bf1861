"""From an example to tokens, and to which of them are trained.

Trained are the assistant's own tokens and the one that ends its turn.  Which those are is read
off the rendered text, not off marker strings: the text is tokenized once, as a whole, and a token
is the assistant's if any character of it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from attrs import evolve, field, frozen

from lorakit.data.tokenizer import Tokenizer
from lorakit.data.turns import Span, assistant_spans
from lorakit.protocols import Conversation, Example, Message, Text


def _as_ids(ids: Iterable[int]) -> array[int]:
    return array("i", ids)


@frozen
class Encoded:
    """A tokenized example, 5 bytes a token: Python's own numbers would take 44, which is gigabytes
    for a data set that trains a model well.

    Attributes:
        ids: `[T]`.
        trained: `[T]` 1 for each token that is trained, else 0.
    """

    ids: array[int] = field(converter=_as_ids)
    trained: bytes = field(converter=bytes)

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
    ids = tokenizer.encode_text(example.text)
    end = tokenizer.token_id("eos_token")
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
    return _all_trained(ids)


def _encode_conversation(
    example: Conversation, tokenizer: Tokenizer, train_on_prompt: bool
) -> Encoded:
    text, generated = tokenizer.render_with_spans(example.messages)
    encoding = tokenizer.encode_rendered(text)
    if train_on_prompt:
        return _all_trained(encoding.ids)
    ids = encoding.ids
    trained = bytearray(len(ids))
    for index in _trained_tokens(example.messages, text, generated, encoding, tokenizer):
        trained[index] = True
    return Encoded(ids, trained)


def _all_trained(ids: Sequence[int]) -> Encoded:
    return Encoded(ids, b"\1" * len(ids))


def _trained_tokens(
    messages: Sequence[Message],
    text: str,
    generated: Sequence[tuple[int, int]],
    encoding: tokenizers.Encoding,
    tokenizer: Tokenizer,
) -> Iterator[int]:
    """Indices of the trained tokens: those in the spans the template marks as generated, where
    it marks one for every turn of the assistant; else those of the turns as they are found."""
    turns = [m for m in messages if m.role == "assistant"]
    if generated and len(generated) == len(turns):
        for message, (start, end) in zip(turns, generated, strict=True):
            if _is_trained(message):
                yield from _tokens_in(encoding, start, end)
        return
    for span in assistant_spans(messages, text, tokenizer):
        if _is_trained(messages[span.turn]):
            yield from _turn_tokens(span, encoding, tokenizer)


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" if message.trained is None else message.trained


def _turn_tokens(span: Span, encoding: tokenizers.Encoding, tokenizer: Tokenizer) -> list[int]:
    """Indices of the turn's tokens, up to and with the special token that ends it.

    What a template writes behind that token (a newline, usually) is not the model's to say.
    A turn that no special token ends is trained to the end of its content.
    """
    taken = list(_tokens_in(encoding, span.start, span.end))
    # Each access to an encoding's attribute makes the whole list anew.
    ids, offsets = encoding.ids, encoding.offsets
    for count, index in enumerate(taken, start=1):
        if offsets[index][0] >= span.content_end and tokenizer.is_special(ids[index]):
            return taken[:count]
    return [index for index in taken if offsets[index][0] < span.content_end]


def _tokens_in(encoding: tokenizers.Encoding, start: int, end: int) -> Iterator[int]:
    """Indices of the tokens that have a character of `[start, end)`.  A token that joins the
    prompt's last space with the answer's first word is the answer's."""
    for index, (first, last) in enumerate(encoding.offsets):
        if first < end and last > start and first < last:
            yield index
