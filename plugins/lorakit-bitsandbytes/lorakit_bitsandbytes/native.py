"""bitsandbytes' native CPU kernel for NF4, made to write where it is told to.

Its operator gives each result in new memory, to be copied from; for a 7B model's weights in bf16
that takes twice the time, and seven times where freed memory is given back.  The C function under
it takes the place to write to.  It is no public interface: it is called only in versions whose
call of it was read, and only once it has given what the operator gives.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_longlong, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorakit_bitsandbytes import library

KNOWN_VERSIONS = ("0.49.", "0.50.")
SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Dequantize = Callable[[Tensor, Tensor, int, Tensor], None]
"""`(packed, scales, block_size, out)`: codes of `[m, n]` weights, two to a byte; scales of their
blocks, fp32; and where to write them, `[m, n]` in the dtype it was asked for."""


@cache
def dequantizer(dtype: torch.dtype) -> Dequantize | None:
    """The kernel for results of a dtype; None where only the operator is to be had."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    module = library.load()
    suffix = SUFFIXES.get(dtype)
    if suffix is None or not module.__version__.startswith(KNOWN_VERSIONS):
        return None
    try:
        function: Any = getattr(module.cextension.lib, f"cdequantize_blockwise_cpu_nf4_{suffix}")
    except AttributeError:
        return None

    def dequantize(packed: Tensor, scales: Tensor, block_size: int, out: Tensor) -> None:
        places = [c_void_p(tensor.data_ptr()) for tensor in (packed, scales, out)]
        function(*places, *map(c_longlong, (block_size, *out.shape)))

    with unset_fake_temporarily(), torch.inference_mode(False), torch.device("cpu"):
        return dequantize if _agrees(dequantize, dtype) else None


def _agrees(dequantize: Dequantize, dtype: torch.dtype) -> bool:
    """Whether it does on a small weight what the operator does."""
    rows, columns, block_size = 3, 128, 64
    packed = torch.arange(rows * columns // 2).remainder(251).to(torch.uint8)
    scales = torch.linspace(0.01, 3, rows * columns // block_size)
    expected = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, scales, block_size, "nf4", (rows, columns), dtype
    )
    found = torch.full((rows, columns), torch.nan, dtype=dtype)
    try:
        dequantize(packed, scales, block_size, found)
    except Exception:
        # A library that could not be loaded says so only now.
        return False
    return torch.equal(found, expected)
