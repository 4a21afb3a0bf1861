"""SentencePiece BPE: llama.cpp's tokenizer model `llama`."""

from __future__ import annotations

from tokenizers import Tokenizer

from lorakit.data.sentencepiece_bpe import Piece, PieceKind, sentencepiece_bpe
from lorakit.errors import UserError
from lorakit_gguf.vocabulary import Vocabulary


def sentence_piece_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer with its special tokens, as in the tokenizer.json of Llama 2 and Mistral 7B.

    Raises:
        UserError: There are neither scores nor merges.
    """
    if not vocabulary.scores and not vocabulary.merges:
        raise UserError(f"{vocabulary.path}: its tokenizer has neither scores nor merges")
    merges = [(m[:cut], m[cut + 1 :]) for m in vocabulary.merges if (cut := m.find(" ", 1)) > 0]
    scores = vocabulary.scores or [0.0] * len(vocabulary.tokens)
    entries = zip(vocabulary.tokens, scores, vocabulary.kinds, strict=True)
    return sentencepiece_bpe(
        [Piece(*entry) for entry in entries],
        dummy_prefix=vocabulary.add_space_prefix,
        byte_fallback=vocabulary.kinds.count(PieceKind.BYTE) == 256,
        merges=merges,
    )
