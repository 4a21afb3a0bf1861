"""Files in a memory map, read without keeping what was read.

The pages of a map stay in the process's resident memory once touched, so that reading a whole
checkpoint through one makes the process as large as the file.  Whoever gives out tensors over a
map therefore lets go of each one's pages when it gives out the next.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MappedFile:
    """A file, mapped privately: writing to it changes this process's memory only.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is empty.
    """

    def __init__(self, path: Path) -> None:
        import torch

        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._start = torch.frombuffer(self.data, dtype=torch.uint8).data_ptr()

    def view(self, start: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The bytes `start` to `end` as a tensor over the map (a copy where not aligned).

        Raises:
            ValueError: They are not as many as the shape takes, or lie outside the file.
        """
        import torch

        count = prod(shape)
        inside = 0 <= start <= end <= len(self.data)
        if end - start != count * dtype.itemsize or not inside:
            raise ValueError(f"bytes {start:,} to {end:,} are not {list(shape)} of {dtype}")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(self.data, dtype=torch.uint8, count=end - start, offset=start)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(shape)

    def release(self, start: int, end: int) -> None:
        """Takes the pages of the bytes `start` to `end` out of resident memory.

        They can still be read: they come back from the file.  What was written to them is lost.
        """
        release_pages(self._start + start, self._start + end)


def release_pages(start: int, end: int) -> None:
    """`MappedFile.release` by address.  All of it must lie in a private map of a file: any other
    memory would read as zeros from then on."""
    madvise = _madvise()
    if madvise is None or start >= end:
        return
    # Rounding out takes neighbours' pages too, which come back as well.
    start -= start % mmap.PAGESIZE
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


@cache
def _madvise() -> Callable[..., int] | None:
    """The C library's function; None where a platform has none, and pages stay."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        found: Callable[..., int] = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    return found
