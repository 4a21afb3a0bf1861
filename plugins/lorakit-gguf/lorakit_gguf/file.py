"""An opened GGUF file: typed access to its metadata, and its tensors as torch tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import gguf
from lorakit.errors import UserError, listing
from lorakit.weights.mapped import MappedFile
from lorakit_gguf.header import Header, StoredTensor, read_header

_Type = GGMLQuantizationType
_PLAIN = {
    _Type.F32: (np.float32, torch.float32),
    _Type.F16: (np.float16, torch.float16),
    _Type.BF16: (np.int16, torch.bfloat16),  # numpy has no bfloat16: the bits travel as int16
}

T = TypeVar("T", bound="int | float | str | list[Any]")
_REQUIRED: Any = object()


class GGUFFile:
    """A GGUF file, mapped into memory.

    Attributes:
        path: The file.
        fields: The metadata, by key: numbers, strings, booleans and lists of them.
        tensors: What is stored, by llama.cpp's names.

    Raises:
        UserError: It cannot be read, is damaged, or has tensors of a type that the gguf package
            cannot dequantize.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._mapped = MappedFile(path)
        except ValueError:  # mmap's word for an empty file
            raise UserError(f"{path}: not a GGUF file: it is empty") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        blocks = {kind.value: sizes for kind, sizes in GGML_QUANT_SIZES.items()}
        header: Header = read_header(path, self._mapped.data, blocks)
        self.fields: Mapping[str, Any] = header.fields
        self.tensors: Mapping[str, StoredTensor] = header.tensors
        self._check_kind()

    def _check_kind(self) -> None:
        parts = self.get("split.count", int, 1)
        if parts > 1:
            raise UserError(
                f"{self.path}: one part of {parts} of a split model",
                "Join them first: `llama-gguf-split --merge FIRST_PART OUTPUT`.",
            )
        kinds = {_Type(stored.type) for stored in self.tensors.values()}
        if unreadable := sorted(kind.name for kind in kinds if not _can_read(kind)):
            readable = sorted(kind.name for kind in _Type if _can_read(kind))
            raise UserError(
                f"{self.path}: has tensors of type {listing(unreadable)}, which gguf cannot "
                "dequantize",
                f"Take the model in another type, such as {listing(readable)}.",
            )

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...

    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...

    @overload
    def get(self, key: str, kind: type[T], default: None) -> T | None: ...

    def get(self, key: str, kind: type[Any], default: Any = _REQUIRED) -> Any:
        """The metadata field `key`, of type `kind` (a float may be stored as an integer).

        Raises:
            UserError: It is of another type, or missing though there is no default.
        """
        if key not in self.fields:
            if default is _REQUIRED:
                raise UserError(f"{self.path}: the metadata field {key} is missing")
            return default
        value = self.fields[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(
                f"{self.path}: the metadata field {key} should be of type {kind.__name__}, "
                f"but is of type {type(value).__name__}"
            )
        return value

    def type_name(self, name: str) -> str:
        """The tensor's type as llama.cpp spells it: `F32`, `Q4_1`, `Q6_K`."""
        return _Type(self.tensors[name].type).name

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, rows first: F16 and BF16 as they are, everything else in float32.

        Plain types share memory with the map of the file; quantized ones are dequantized by
        `gguf.quants`, the reference implementation in Python.
        """
        stored = self.tensors[name]
        kind = _Type(stored.type)
        data = np.frombuffer(self._mapped.data, np.uint8, stored.size, stored.offset)
        if kind in _PLAIN:
            as_numpy, as_torch = _PLAIN[kind]
            return torch.from_numpy(data.view(as_numpy)).view(as_torch).reshape(stored.shape)
        rows = data.reshape(*stored.shape[:-1], -1)
        return torch.from_numpy(gguf.quants.dequantize(rows, kind)).reshape(stored.shape)

    def release(self, name: str) -> None:
        """Takes the tensor's pages out of resident memory; see `lorakit.weights.mapped`."""
        stored = self.tensors[name]
        self._mapped.release(stored.offset, stored.offset + stored.size)

    def main_dtype(self) -> torch.dtype:
        """The dtype most of the values come out in."""
        values: Counter[torch.dtype] = Counter()
        for stored in self.tensors.values():
            _, dtype = _PLAIN.get(_Type(stored.type), (None, torch.float32))
            values[dtype] += int(np.prod(stored.shape))
        return values.most_common(1)[0][0] if values else torch.float32


def _can_read(kind: GGMLQuantizationType) -> bool:
    """Whether gguf can dequantize `kind`; asked with one block of zeros."""
    if kind in _PLAIN:
        return True
    _, size = GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
