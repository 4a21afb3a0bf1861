"""SentencePiece's BPE as a `tokenizers` tokenizer.

Source: Kudo and Richardson, "SentencePiece", 2018, https://github.com/google/sentencepiece; what
a piece's kind means is in its src/sentencepiece_model.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from attrs import frozen
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from lorakit.data.merges import Merge, merges_by_rank

SPACE = "▁"


class PieceKind(IntEnum):
    """`SentencePiece.Type`; the same numbers stand in GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_JOINED = frozenset([PieceKind.NORMAL, PieceKind.USER_DEFINED, PieceKind.UNUSED])


@frozen
class Piece:
    """An entry of the vocabulary; the higher its score, the sooner it is joined."""

    text: str
    score: float
    kind: int


def sentencepiece_bpe(
    pieces: Sequence[Piece],
    *,
    dummy_prefix: bool,
    byte_fallback: bool,
    before: Sequence[normalizers.Normalizer] = (),
    merges: Sequence[Merge] | None = None,
) -> Tokenizer:
    """The tokenizer, without a post-processor.

    Control pieces are special tokens.  User-defined pieces are found whole wherever they stand,
    and are text.

    Args:
        pieces: By id.
        dummy_prefix: Put a space in front of every text, and of what follows a special token:
            the original's users encode that as a text of its own.
        byte_fallback: Characters without a piece become their bytes' pieces.
        before: What is done to the text before its spaces become visible.
        merges: The merges, best first, where they are known.
    """
    texts = _with_visible_spaces(pieces)
    ids = {text: index for index, text in enumerate(texts)}
    ranks = {
        text: -piece.score
        for text, piece in zip(texts, pieces, strict=True)
        if piece.kind in _JOINED
    }
    unknown = [t for t, p in zip(texts, pieces, strict=True) if p.kind == PieceKind.UNKNOWN]
    defined = [t for t, p in zip(texts, pieces, strict=True) if p.kind == PieceKind.USER_DEFINED]
    # An added token breaks the text in two, and the second part would get a prefix as well.
    isolated = defined if dummy_prefix else [t for t in defined if not t.strip(SPACE)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=list(merges) if merges else merges_by_rank(ranks, ids),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=byte_fallback,
            # An isolated piece need not be made of other pieces.
            ignore_merges=any(t.strip(SPACE) for t in isolated),
        )
    )
    visible = [normalizers.Replace(" ", SPACE)]
    prefix = [normalizers.Prepend(SPACE)] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, *prefix, *visible])
    if isolated:
        longest_first = "|".join(map(_literal, sorted(isolated, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [
        t
        for t, p in zip(texts, pieces, strict=True)
        if p.kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)
    ]
    added = [t for t in defined if t not in set(isolated)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return tokenizer


def _with_visible_spaces(pieces: Sequence[Piece]) -> list[str]:
    """The pieces' texts; spaces in user-defined ones, which a file may keep as they are, become
    `▁`, because they are looked for in text whose spaces already have."""
    taken = {piece.text for piece in pieces}
    visible = [
        p.text.replace(" ", SPACE) if p.kind == PieceKind.USER_DEFINED else p.text for p in pieces
    ]
    return [
        new if new not in taken else piece.text for new, piece in zip(visible, pieces, strict=True)
    ]


def _literal(text: str) -> str:
    """The regular expression that matches just `text`, in Oniguruma's syntax."""
    return "".join(f"\\x{{{ord(c):x}}}" for c in text)
