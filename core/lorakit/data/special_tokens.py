"""Which tokens end a turn, and which one may pad: read off the tokenizer and its template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.errors import UserError
from lorakit.protocols import Message

if TYPE_CHECKING:
    from lorakit.data.tokenizer import Tokenizer

_PROBE = (Message("user", "Question"), Message("assistant", "Answer"))
_NAMED_FOR_PADDING = ("pad",)
_NEVER_USED = ("reserved", "unused", "extra")


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The special token that the template writes behind an answer; None if it writes none, or
    refuses an exchange of two turns."""
    try:
        text = tokenizer.render(_PROBE)
    except (ValueError, UserError):
        return None
    content = _PROBE[-1].content
    answered = text.rfind(content) + len(content)
    encoding = tokenizer.encode_rendered(text)
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if answered <= start < end and tokenizer.is_special(token):
            return int(token)
    return None


def padding_token(tokenizer: Tokenizer) -> str | None:
    """A padding token for those who train further with what is saved.

    They mask it, and would mask the end of every answer along with it if it were the same token.
    The tokenizer's own stays if it ends nothing; else it is one named for padding, the unknown
    token, or one that no text has.  None if there is none of these.
    """
    names = tokenizer.special_tokens
    own = tokenizer.token_id("pad_token")
    taken = tokenizer.stop_ids | {tokenizer.token_id("bos_token"), tokenizer.token_id("eos_token")}
    if own is not None and own not in taken:
        return names["pad_token"]
    added = tokenizer.backend.get_added_tokens_decoder()
    special = [t.content for i, t in sorted(added.items()) if t.special and i not in taken]
    unknown = [text for text in special if text == names.get("unk_token")]
    for group in (_named(special, _NAMED_FOR_PADDING), unknown, _named(special, _NEVER_USED)):
        if group:
            return group[0]
    return None


def _named(tokens: list[str], words: tuple[str, ...]) -> list[str]:
    return [token for token in tokens if any(word in token.lower() for word in words)]
