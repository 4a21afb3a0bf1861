"""Byte-level BPE, GPT-2's kind: llama.cpp's tokenizer model `gpt2`.

Text is first cut by regular expressions, which each model family has its own of; the file gives
only their name (`tokenizer.ggml.pre`).  A name not listed here is an error, because a tokenizer
that cuts nearly right gives ids the model has never seen.

The expressions are facts from two sources that agree: the families' own tokenizer.json, and
`llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from tokenizers import Tokenizer

from lorakit.data.byte_level import (
    WORDS_AND_DIGITS,
    WORDS_AND_THREE_DIGITS,
    Cutting,
    byte_level_bpe,
)
from lorakit.errors import UserError, did_you_mean
from lorakit_gguf.vocabulary import Vocabulary

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DIGITS_FIRST = Cutting(digits=True, gpt2=True)
_LIKE_GPT2 = Cutting(gpt2=True)
_LIKE_LLAMA3 = Cutting(regexes=(WORDS_AND_THREE_DIGITS,), whole_words=True)

CUTTINGS = {
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "command-r": _DIGITS_FIRST,
    "gpt-2": _LIKE_GPT2,
    "mpt": _LIKE_GPT2,
    "olmo": _LIKE_GPT2,
    "llama-bpe": _LIKE_LLAMA3,
    "llama3": _LIKE_LLAMA3,
    "llama-v3": _LIKE_LLAMA3,
    "qwen2": Cutting(regexes=(WORDS_AND_DIGITS,), nfc=True),
    # llama.cpp's own, for models whose tokenizer its converter did not look at.
    "default": Cutting(
        regexes=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
}
"""By the value of `tokenizer.ggml.pre`."""


def byte_level_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer, without its special tokens.

    Raises:
        UserError: The cutting has a name that is not known, or a merge is of tokens that are not
            in the vocabulary.
    """
    name = vocabulary.pre
    if not name:
        raise UserError(
            f"{vocabulary.path}: does not say how its tokenizer cuts text (tokenizer.ggml.pre)",
            "It was made by an old converter; take a newer file of the same model.",
        )
    if name not in CUTTINGS:
        raise UserError(
            f"{vocabulary.path}: its tokenizer cuts text in the way {name!r}, which is not known "
            f"here{did_you_mean(name, CUTTINGS)}; known: {', '.join(CUTTINGS)}",
            "Take the model in Hugging Face's format, which has a tokenizer.json.",
        )
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    return byte_level_bpe(ids, _pairs(vocabulary, ids), CUTTINGS[name])


def _pairs(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in vocabulary.merges:
        # A token may start with a space in spite of everything, so the first is looked for behind.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise UserError(f"{vocabulary.path}: its merge {merge!r} is not of tokens it has")
        pairs.append((left, right))
    return pairs
