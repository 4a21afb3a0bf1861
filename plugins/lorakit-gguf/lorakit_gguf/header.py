"""Reads the header of a GGUF file: its metadata and where its tensors lie.

The gguf package has a reader too, but it makes a numpy view of every single token (1.6 s for
SmolLM2's header, against 0.1 s here) and checks no length against the size of the file, so that
a damaged file ends in whatever exception comes first, or in all memory being taken.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.errors import UserError

_VERSIONS = (2, 3)  # Version 1 had 32-bit counts; llama.cpp gave it up in 2023.
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_NESTING = 4

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # for struct
_FLOAT32, _STRING, _ARRAY = 6, 8, 9

_DOWNLOAD_AGAIN = "Download it again and compare its size and checksum with the original's."


class BrokenFile(Exception):
    """The bytes are not what the format says; the message goes on from the file's name."""


@frozen
class StoredTensor:
    """A tensor in the file.

    Attributes:
        shape: Rows first, as torch has it; the file lists dimensions the other way round.
        type: The number of its `gguf.GGMLQuantizationType`.
        offset: Of its first byte, from the start of the file.
        size: In bytes.
    """

    shape: tuple[int, ...]
    type: int
    offset: int
    size: int


@frozen
class Header:
    """A file's metadata (`fields`, by key) and the tensors in it, in the file's order."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path, data: mmap.mmap, blocks: Mapping[int, tuple[int, int]]) -> Header:
    """Parses `data`, the mapped file.

    Args:
        path: For messages.
        data: The whole file.
        blocks: For each tensor type, how many values a block holds and how many bytes it takes.

    Raises:
        UserError: The file is no GGUF, or damaged, or of a kind that cannot be read here.
    """
    try:
        return _parse(data, blocks)
    except BrokenFile as error:
        raise UserError(f"{path}: {error}", _DOWNLOAD_AGAIN) from None


def _parse(data: mmap.mmap, blocks: Mapping[int, tuple[int, int]]) -> Header:
    if data[:4] != b"GGUF":
        raise BrokenFile(f"not a GGUF file: it starts with {data[:4]!r}, not b'GGUF'")
    cursor = _Cursor(data, 4)
    version = cursor.scalar("I", "the version")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0:
            raise BrokenFile("is in big-endian byte order, which is not supported")
        raise BrokenFile(f"is GGUF version {version}; supported are versions 2 and 3")
    tensor_count = cursor.scalar("Q", "the tensor count")
    field_count = cursor.scalar("Q", "the field count")

    fields: dict[str, Any] = {}
    for index in range(field_count):
        key = cursor.string(f"the key of metadata field {index}")
        if key in fields:
            raise BrokenFile(f"is damaged: the metadata field {key} comes twice")
        fields[key] = cursor.value(cursor.scalar("I", key), key)

    entries = [_tensor_entry(cursor, index) for index in range(tensor_count)]
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise BrokenFile(f"is damaged: general.alignment is {alignment!r}, not a power of two")
    start = -(-cursor.position // alignment) * alignment

    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise BrokenFile(f"is damaged: the tensor {name} comes twice")
        if offset % alignment:
            raise BrokenFile(f"is damaged: the tensor {name} is not aligned to {alignment} bytes")
        stored = StoredTensor(shape, kind, start + offset, _size(name, shape, kind, blocks))
        if stored.offset + stored.size > len(data):
            raise BrokenFile(
                f"is cut short: the tensor {name} ends at byte {stored.offset + stored.size:,}, "
                f"but the file has {len(data):,}"
            )
        tensors[name] = stored
    return Header(fields, tensors)


def _tensor_entry(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"the name of tensor {index}")
    count = cursor.scalar("I", name)
    if not 1 <= count <= _MOST_DIMENSIONS:
        raise BrokenFile(f"is damaged: the tensor {name} has {count} dimensions")
    shape = tuple(cursor.scalar("Q", name) for _ in range(count))[::-1]
    return name, shape, cursor.scalar("I", name), cursor.scalar("Q", name)


def _size(
    name: str, shape: tuple[int, ...], kind: int, blocks: Mapping[int, tuple[int, int]]
) -> int:
    if kind not in blocks:
        raise BrokenFile(
            f"has tensor {name} of type number {kind}, which the installed gguf package does "
            "not know (a newer one may)"
        )
    values, size = blocks[kind]
    if min(shape) < 1 or shape[-1] % values:
        raise BrokenFile(f"is damaged: the tensor {name} has shape {list(shape)}")
    return prod(shape) // values * size


class _Cursor:
    """Reads values one after the other, and none from beyond the end."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, size: int, what: str) -> int:
        """Steps over `size` bytes; returns where they start."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise BrokenFile(f"is cut short or damaged: it ends inside {what}")
        return start

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.data, self.take(size, what))[0]

    def string(self, what: str) -> str:
        size = self.scalar("Q", what)
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            raise BrokenFile(f"is damaged: {what} is not UTF-8 text") from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _FLOAT32:
            return _shortest_decimal(self.scalar("f", key))
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], key)
        if kind == _ARRAY and depth < _MOST_NESTING:
            return self.array(key, depth)
        raise BrokenFile(f"is damaged: the metadata field {key} is of unknown type {kind}")

    def array(self, key: str, depth: int) -> list[Any]:
        kind, count = self.scalar("I", key), self.scalar("Q", key)
        if kind in _SCALARS:
            code = f"<{_SCALARS[kind]}"
            start = self.take(count * struct.calcsize(code), key)
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, start))
        # A value takes 8 bytes at least, so a count that cannot fit ends here, not in a long loop.
        if count * 8 > len(self.data) - self.position:
            raise BrokenFile(f"is cut short or damaged: {key} claims {count:,} values")
        if kind == _STRING:
            return [self.string(key) for _ in range(count)]
        return [self.value(kind, key, depth + 1) for _ in range(count)]


def _shortest_decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    stored = struct.pack("<f", value)
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", short) == stored:
                return short
        except OverflowError:
            continue
    return value
