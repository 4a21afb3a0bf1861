"""One safetensors file: its header without torch, its tensors one at a time.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the data).
The safetensors package would do, but what it gives out stays resident until the file is closed,
which for a shard is 5 GB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError
from lorakit.protocols import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Tensor names and specs, in the order of the data.

    Raises:
        UserError: The file is truncated or no safetensors file.
    """
    entries, _ = _entries(path)
    return {name: TensorSpec(tuple(e["shape"]), e["dtype"]) for name, e in entries.items()}


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor over the map of the file, in the order of the data.

    Its pages leave resident memory when the next one is asked for; it can be read after that,
    as long as the file is what it was.

    Raises:
        UserError: The file is truncated, no safetensors file, or has tensors of a dtype that
            this torch does not know.
    """
    from lorakit.weights.dtypes import torch_dtype
    from lorakit.weights.mapped import MappedFile

    entries, data_start = _entries(path)
    data = MappedFile(path)
    for name, entry in entries.items():
        start, end = (data_start + offset for offset in entry["data_offsets"])
        dtype = torch_dtype(entry["dtype"])
        if dtype is None:
            raise UserError(f"{path}: {name} is of dtype {entry['dtype']}, which torch lacks")
        try:
            tensor = data.view(start, end, dtype, tuple(entry["shape"]))
        except ValueError as error:
            raise unreadable(path, f"{name}: {error}") from None
        yield name, tensor
        data.release(start, end)


def _entries(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header by tensor name, in the order of the data, and where the data starts."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise unreadable(path, f"it is {size:,} bytes long, its header alone {length:,}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ordered = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]))
        end = max((entry["data_offsets"][1] for entry in ordered.values()), default=0)
        for entry in ordered.values():
            sizes = [*entry["shape"], *entry["data_offsets"]]
            if not isinstance(entry["dtype"], str) or any(
                type(n) is not int or n < 0 for n in sizes
            ):
                raise ValueError(f"an entry of {entry}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, str(error)) from None
    if 8 + length + end != size:
        raise unreadable(path, f"its header describes {8 + length + end:,} bytes, it has {size:,}")
    return ordered, 8 + length


def unreadable(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: not a readable safetensors file: {why}",
        "It may be truncated; fetch it again.",
    )
