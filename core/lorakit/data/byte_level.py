"""Byte-level BPE, GPT-2's kind: text is cut by regular expressions, then every piece is merged
from its bytes.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and its
`bytes_to_unicode`, which writes every byte as a visible character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from attrs import frozen
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from lorakit.data.merges import Merge

WORDS_AND_THREE_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_AND_DIGITS = WORDS_AND_THREE_DIGITS.replace(r"\p{N}{1,3}", r"\p{N}")


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


def byte_level_bpe(ids: Mapping[str, int], merges: Sequence[Merge], cutting: Cutting) -> Tokenizer:
    """The tokenizer, without special tokens and post-processor; tokens and merges are written in
    GPT-2's visible characters."""
    tokenizer = Tokenizer(
        models.BPE(vocab=dict(ids), merges=list(merges), ignore_merges=cutting.whole_words)
    )
    if cutting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cutting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def visible_bytes() -> tuple[str, ...]:
    """The visible character of each byte, by its value: Latin-1's printable ones are
    themselves, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(b if b in printable else next(others)) for b in range(256))


def visible(token: bytes) -> str:
    """The token in visible characters."""
    table = visible_bytes()
    return "".join(table[byte] for byte in token)
