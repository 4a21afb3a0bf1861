"""SentencePiece's model files (`tokenizer.model`), read without the sentencepiece package.

The package would give ids but no offsets that agree with special tokens, and not the normalizer's
settings, which a tokenizer.json needs.  A model file is a protobuf message of three fields that
matter, so a reader of that wire format is all it takes.

Format: src/sentencepiece_model.proto in https://github.com/google/sentencepiece, and
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from attrs import field, frozen
from tokenizers import Regex, Tokenizer, normalizers

from lorakit.data.sentencepiece_bpe import Piece, PieceKind, sentencepiece_bpe
from lorakit.errors import UserError

_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE = 2
COPY = "Take a copy of the model that has a tokenizer.json."


@frozen(kw_only=True)
class SentencePieceModel:
    """What a model file says.

    Attributes:
        where: The file, for messages.
        pieces: By id.
        trainer: `TrainerSpec`, by field number.
        normalizer: `NormalizerSpec`, by field number.
    """

    where: str
    pieces: tuple[Piece, ...]
    trainer: dict[int, Any] = field(repr=False)
    normalizer: dict[int, Any] = field(repr=False)

    @classmethod
    def read(cls, content: bytes, where: str) -> SentencePieceModel:
        """Raises `UserError` if `content` is no model file."""
        pieces: list[Piece] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        try:
            for number, value in _fields(content):
                if number == 1:
                    entry = dict(_fields(value))
                    score = struct.unpack("<f", entry.get(2, b"\0\0\0\0"))[0]
                    pieces.append(Piece(entry[1].decode("utf-8"), score, entry.get(3, 1)))
                elif number == 2:
                    trainer = dict(_fields(value))
                elif number == 3:
                    normalizer = dict(_fields(value))
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error):
            pieces = []
        if not pieces:
            raise UserError(
                f"{where}: neither a SentencePiece model nor a tiktoken file",
                "It may be truncated, or a pointer to a large file; fetch it again.",
            )
        return cls(where=where, pieces=tuple(pieces), trainer=trainer, normalizer=normalizer)

    def special(self) -> dict[str, str]:
        """`bos_token`, `eos_token` ..., those that the model has."""
        numbers = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2)}
        numbers["pad_token"] = (43, -1)
        ids = {name: _signed(self.trainer.get(n, d)) for name, (n, d) in numbers.items()}
        return {n: self.pieces[i].text for n, i in ids.items() if 0 <= i < len(self.pieces)}

    def tokenizer(self) -> Tokenizer:
        """The model as a `tokenizers` tokenizer, without a post-processor.

        Raises:
            UserError: It is of a kind that cannot be rebuilt.
        """
        kind = self.trainer.get(3, 1)
        if kind != _BPE:
            raise UserError(
                f"{self.where}: a SentencePiece model of type {_MODEL_TYPES.get(kind, kind)}; "
                "lorakit rebuilds BPE models",
                COPY,
            )
        if self.trainer.get(24, 0):
            raise UserError(
                f"{self.where}: marks the ends of words in place of their starts "
                "(treat_whitespace_as_suffix), which lorakit does not rebuild",
                COPY,
            )
        texts = [piece.text for piece in self.pieces]
        if len(set(texts)) < len(texts):
            raise UserError(f"{self.where}: its vocabulary has the same piece twice")
        byte_pieces = sum(piece.kind == PieceKind.BYTE for piece in self.pieces)
        return sentencepiece_bpe(
            self.pieces,
            dummy_prefix=bool(self.normalizer.get(3, 1)),
            byte_fallback=byte_pieces == 256,
            before=self._normalizers(),
        )

    def _normalizers(self) -> list[normalizers.Normalizer]:
        steps: list[normalizers.Normalizer] = []
        if charsmap := self.normalizer.get(2):
            steps.append(normalizers.Precompiled(charsmap))
            defined = (p.text for p in self.pieces if p.kind == PieceKind.USER_DEFINED)
            if any(steps[0].normalize_str(text) != text for text in defined):
                raise UserError(
                    f"{self.where}: has user-defined pieces that its normalizer would change, "
                    "which lorakit does not rebuild",
                    COPY,
                )
        if self.normalizer.get(4, 1):
            steps += [
                normalizers.Replace(Regex(r"\A +| +\z"), ""),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        return steps


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values: integers, 4 or 8 raw bytes, or what is length-delimited."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        else:
            length = {1: 8, 5: 4}[wire]
        if at + length > len(message):
            raise ValueError("the message ends early")
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
