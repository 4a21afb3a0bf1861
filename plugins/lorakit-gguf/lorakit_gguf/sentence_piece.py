"""SentencePiece BPE: llama.cpp's tokenizer model `llama`.

The file has pieces and scores, but no merges.  SentencePiece joins, over and over, the two
neighbours whose joint piece has the highest score; that is BPE with one merge for every way to
put a piece together from two others, ordered by the score of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

from lorakit.errors import UserError
from lorakit_gguf.vocabulary import Kind, Vocabulary

_SPACE = "▁"
_JOINED = frozenset([Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED])


def sentence_piece_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer, without its special tokens.

    As in the tokenizer.json of Llama 2 and Mistral 7B: no pre-tokenizer; a normalizer puts `▁`
    in front of the text and in the place of every space; characters without a piece fall back to
    bytes.

    Raises:
        UserError: There are no scores.
    """
    if not vocabulary.scores and not vocabulary.merges:
        raise UserError(f"{vocabulary.path}: its tokenizer has neither scores nor merges")
    tokens = _with_visible_spaces(vocabulary.tokens)
    ids = {token: index for index, token in enumerate(tokens)}
    bytes_there = sum(kind == Kind.BYTE for kind in vocabulary.kinds)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(tokens, vocabulary),
            unk_token=vocabulary.token("unk"),
            fuse_unk=True,
            byte_fallback=bytes_there == 256,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = vocabulary.add_space_prefix
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _with_visible_spaces(tokens: Sequence[str]) -> list[str]:
    """Runs of spaces, which the file keeps as spaces where they are user-defined, as `▁▁`."""
    taken = set(tokens)
    visible = [t if t.strip(" ") else _SPACE * len(t) for t in tokens]
    return [new if new not in taken else old for old, new in zip(tokens, visible, strict=True)]


def _merges(tokens: list[str], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best first; of equals, the lower ids first."""
    if vocabulary.merges:
        return [(m[:cut], m[cut + 1 :]) for m in vocabulary.merges if (cut := m.find(" ", 1)) > 0]
    usable = {
        token: (-vocabulary.scores[index], index)
        for index, token in enumerate(tokens)
        if vocabulary.kinds[index] in _JOINED
    }
    ranked = []
    for token, (rank, _) in usable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                ranked.append((rank, usable[left][1], usable[right][1], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
