"""One file of torch.save: a state dict, read without running what is pickled in it.

Format: https://docs.pytorch.org/docs/stable/notes/serialization.html.  Since torch 1.6 it is a zip
archive whose tensors lie uncompressed, so that it can be mapped; older files are a pickle and are
read as a whole, one file at a time.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import UserError
from lorakit.protocols import TensorSpec
from lorakit.weights.dtypes import dtype_name
from lorakit.weights.mapped import release_pages


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names and specs, without reading the data.

    Raises:
        UserError: As `read_tensors`.
    """
    state = _load(path, "meta")
    return {name: TensorSpec(tuple(t.shape), dtype_name(t.dtype)) for name, t in state.items()}


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor over the map of the file; its pages leave resident memory when the next one is
    asked for.

    Raises:
        UserError: The file is damaged, no state dict of tensors, or needs code to be run.
    """
    mapped = zipfile.is_zipfile(path)
    for name, tensor in _load(path, "cpu").items():
        yield name, tensor
        if mapped:
            release(tensor)


def open_tensors(path: Path) -> Mapping[str, Tensor]:
    """All of them by name, over the map of the file; see `release`.

    Raises:
        UserError: As `read_tensors`, or the file is too old to be mapped.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: cannot be mapped, as it is damaged, or older than torch 1.6")
    return _load(path, "cpu")


def release(tensor: Tensor) -> None:
    """Takes the pages of a tensor of a mapped file out of resident memory."""
    if tensor.numel() == 0:
        return
    last = sum(step * (size - 1) for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    start = tensor.data_ptr()
    release_pages(start, start + (last + 1) * tensor.element_size())


def _load(path: Path, device: str) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(
            path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    # What a damaged pickle raises is anything.
    except Exception as error:
        raise UserError(
            f"{path}: not a readable torch file: {repr(error)[:200]}",
            "It may be truncated; fetch it again.",
        ) from None
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path}: not a state dict, which has tensors by name and nothing else")
    return {name: tensor.detach() for name, tensor in state.items()}


def _refused(path: Path, why: str) -> UserError:
    """torch's message is a page long; the thing it will not make stands in it as `GLOBAL x`."""
    words = why.replace("`", " ").split()
    named = [after for word, after in pairwise(words) if word == "GLOBAL"]
    what = f" ({named[0]})" if named else ""
    return UserError(
        f"{path}: loading it could run code{what}, which lorakit does not do",
        "Take the model as safetensors, or save its state dict, tensors only, with torch.save.",
    )
