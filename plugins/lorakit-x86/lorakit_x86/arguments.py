"""What native functions are told: addresses, strides, sizes."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def places(*tensors: Tensor) -> tuple[int, ...]:
    """Where each is, and how far apart its rows are."""
    return tuple(n for x in tensors for n in (x.data_ptr(), x.stride(0)))


def layer(
    rows: int, weight: Tensor, down: Tensor, up: Tensor, scale: float, ratio: Tensor | None = None
) -> tuple[float, ...]:
    """A layer with a low-rank update, for so many rows: where all is, and sizes."""
    rank, inputs = down.shape
    return (
        weight.data_ptr(),
        weight.stride(0),
        weight.dtype == torch.bfloat16,
        down.data_ptr(),
        up.data_ptr(),
        0 if ratio is None else ratio.data_ptr(),
        scale,
        rows,
        inputs,
        up.shape[0],
        rank,
    )


def threads() -> tuple[int, int]:
    """How many, and where the function is that runs another in so many; 0 where there is none."""
    parallel = _parallel()
    return (torch.get_num_threads() if parallel else 1), parallel


@cache
def _parallel() -> int:
    """The address of GOMP_parallel in the OpenMP library that torch has loaded: so its threads are
    used, and not others that would take the cores from them."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
