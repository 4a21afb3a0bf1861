"""Writes any base checkpoint as a Hugging Face model directory.

The weights are streamed: the headers say beforehand where each tensor goes, so that one tensor
is in memory at a time, however large the model.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the data), and
transformers' model.safetensors.index.json for more than one file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.protocols import BaseCheckpoint, Progress

MOST_SHARD_BYTES = 5_000_000_000
"""Tensors of more bytes than this are spread over several files, as on the Hugging Face hub."""

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_directory(
    checkpoint: BaseCheckpoint,
    directory: Path,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
    most_shard_bytes: int = MOST_SHARD_BYTES,
) -> None:
    """Writes config.json, the tokenizer's and other small files, and the weights.

    Args:
        checkpoint: What to write.
        directory: Where to; it exists.
        progress: Shows a task, counted in tensors.
        dtype: All tensors are converted to it: float32, float16 or bfloat16.
        most_shard_bytes: Tensors of more bytes than this are spread over several files.

    Raises:
        UserError: The checkpoint cannot be read.
        OSError: The directory cannot be written to.
    """
    config = {**checkpoint.config, "torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(directory / "config.json", config)
    for name, content in checkpoint.files().items():
        (directory / name).write_bytes(content)
    _write_weights(checkpoint, directory, progress, dtype, most_shard_bytes)


def _write_weights(
    checkpoint: BaseCheckpoint,
    directory: Path,
    progress: Progress,
    dtype: torch.dtype,
    most_shard_bytes: int,
) -> None:
    shapes = {
        name: spec.shape for shard in checkpoint.shards().values() for name, spec in shard.items()
    }
    shards = _plan(shapes, dtype.itemsize, most_shard_bytes)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(
                _Shard(directory / name, {t: shapes[t] for t in names}, dtype)
            )
            for name, names in shards.items()
        }
        place = {tensor: files[name] for name, names in shards.items() for tensor in names}
        title = f"Converting {checkpoint.path.name}"
        task = stack.enter_context(progress.task(title, len(shapes), "tensors"))
        for name, tensor in checkpoint.tensors():
            place.pop(name).write(name, tensor)
            task.advance()
    if place:
        raise ValueError(f"{checkpoint.path}: announced but not given: {', '.join(place)}")
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(prod, shapes.values())) * dtype.itemsize},
            "weight_map": {tensor: name for name, names in shards.items() for tensor in names},
        }
        _write_json(directory / "model.safetensors.index.json", index)


def _plan(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, most_bytes: int
) -> dict[str, list[str]]:
    """File name -> tensor names: each file is filled up until the next tensor would not fit."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = prod(shape) * itemsize
        if groups[-1] and used + size > most_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


class _Shard:
    """One safetensors file, whose tensors may come in any order."""

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> None:
        self._dtype = dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + prod(shape) * dtype.itemsize
            offsets = [start, end]
            header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": offsets}
        self._slots = {name: header[name] for name in shapes}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # The data starts at a multiple of 8 bytes.
        self._start = 8 + len(text)
        self._file: BinaryIO = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor where the header has announced it."""
        slot = self._slots[name]
        if tuple(tensor.shape) != slot["shape"]:
            raise ValueError(f"{name}: announced as {slot['shape']}, given {tuple(tensor.shape)}")
        flat = tensor.detach().to("cpu", self._dtype).contiguous().reshape(-1)
        self._file.seek(self._start + slot["data_offsets"][0])
        self._file.write(flat.view(torch.uint8).numpy().data)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
