"""Byte-level BPE, GPT-2's kind: llama.cpp's tokenizer model `gpt2`.

Text is first cut by regular expressions, which each model family has its own of; the file gives
only their name (`tokenizer.ggml.pre`).  A name not listed here is an error, because a tokenizer
that cuts nearly right gives ids the model has never seen.

The expressions are facts from two sources that agree: the families' own tokenizer.json, and
`llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from attrs import frozen
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from lorakit.errors import UserError, did_you_mean
from lorakit_gguf.vocabulary import Vocabulary

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@frozen(kw_only=True)
class Cutting:
    """How text is cut before BPE.

    Attributes:
        regexes: One after the other, each cuts the pieces of the last at its matches.
        digits: First put every digit by itself.
        gpt2: Last cut as GPT-2 does, with the expression built into `ByteLevel`.
        whole_words: Take a piece that is a token as that token, whatever the merges say.
        nfc: Compose Unicode characters first.
    """

    regexes: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    whole_words: bool = False
    nfc: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        steps: list[PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps += [pre_tokenizers.Split(Regex(regex), "isolated") for regex in self.regexes]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


_DIGITS_FIRST = Cutting(digits=True, gpt2=True)
_LIKE_GPT2 = Cutting(gpt2=True)
_LIKE_LLAMA3 = Cutting(regexes=(_LLAMA3,), whole_words=True)

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
    "qwen2": Cutting(regexes=(_QWEN2,), nfc=True),
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
    cutting = CUTTINGS[name]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=_pairs(vocabulary, ids), ignore_merges=cutting.whole_words)
    )
    if cutting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cutting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


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
