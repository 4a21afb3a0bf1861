"""Writing safetensors files tensor by tensor.

Format: https://github.com/huggingface/safetensors: the header's length (8 bytes, little-endian),
the header (JSON: dtype, shape and offsets of each tensor), the tensors' bytes without gaps.
Since names, shapes and dtypes are known before any value is, the header can be written first, and
a file of any size needs no more memory than one of its tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lorakit.protocols import TensorSpec
from lorakit.weights.dtypes import dtype_name, torch_dtype


def stored_bytes(spec: TensorSpec) -> int:
    """A tensor's size in the file; its dtype is one that torch has too."""
    return prod(spec.shape) * _dtype(spec).itemsize


def _dtype(spec: TensorSpec) -> torch.dtype:
    found = torch_dtype(spec.dtype)
    if found is None:
        raise ValueError(f"no dtype of torch's: {spec.dtype}")
    return found


class ShardWriter:
    """One safetensors file in the making; a context manager.

    The widest dtypes come first, so that every tensor starts at a multiple of its element's
    size, as readers that map the file need it.

    Args:
        path: The file, made anew.
        specs: All its tensors, of dtypes that torch has.
        metadata: The header's `__metadata__`.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        self.specs = specs
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name in sorted(specs, key=lambda n: -_dtype(specs[n]).itemsize):
            spec, start = specs[name], end
            end = start + stored_bytes(spec)
            self._starts[name] = start
            header[name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._missing = set(specs)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, in any order, rounded to the dtype it was announced with.

        Raises:
            ValueError: It has another shape than announced, or was written already.
        """
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape or name not in self._missing:
            raise ValueError(f"{name} {list(tensor.shape)} is not {list(spec.shape)}, or not new")
        self._missing.remove(name)
        flat = tensor.detach().cpu().to(_dtype(spec)).contiguous().reshape(-1)
        self._file.seek(self._data + self._starts[name])
        self._file.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Flushes to the disk.

        Raises:
            ValueError: A tensor was never written.
        """
        with self._file:
            if kind is None:
                if self._missing:
                    raise ValueError(f"never written: {sorted(self._missing)[:3]}")
                self._file.flush()
                os.fsync(self._file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors.torch.save_file does, which has all their bytes in memory a
    second time; this has one tensor's at most."""
    names = sorted(tensors)
    specs = {n: TensorSpec(tuple(tensors[n].shape), dtype_name(tensors[n].dtype)) for n in names}
    with ShardWriter(path, specs, {"format": "pt"}) as writer:
        for name in names:
            writer.write(name, tensors[name])
