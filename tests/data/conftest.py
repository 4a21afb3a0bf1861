"""SentencePiece model files, written here."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest

Piece = tuple[str, float, int]


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def integer(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def delimited(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def single(field: int, value: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", value)


def model_file(
    pieces: Sequence[Piece],
    *,
    dummy_prefix: bool = True,
    unk: int = 0,
    bos: int = 1,
    eos: int = 2,
    pad: int = -1,
    model_type: int = 2,
) -> bytes:
    """A model of `(text, score, kind)` with byte fallback and without normalization."""
    trainer = integer(3, model_type) + integer(35, 1)
    for offset, number in enumerate((unk, bos, eos, pad)):
        trainer += integer(40 + offset, number)
        if number >= 0:
            trainer += delimited(45 + offset, pieces[number][0].encode())
    normalizer = delimited(1, b"identity") + integer(3, dummy_prefix) + integer(4, 0)
    listed = b"".join(
        delimited(1, delimited(1, text.encode()) + single(2, score) + integer(3, kind))
        for text, score, kind in pieces
    )
    return listed + delimited(2, trainer) + delimited(3, normalizer + integer(5, 1))


@pytest.fixture(scope="session")
def write_model() -> Callable[..., bytes]:
    """`write_model(pieces, dummy_prefix=True, ...)`, see `model_file`."""
    return model_file
