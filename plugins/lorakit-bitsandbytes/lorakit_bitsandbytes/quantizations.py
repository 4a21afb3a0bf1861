"""The quantization schemes: options, what they take, and the checks before a weight is stored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import in_

from lorakit.errors import UserError, listing
from lorakit.options import NoOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Those bitsandbytes allows."""
NESTED_BLOCK = 256
"""Scales in a block of the second quantization."""


@frozen(kw_only=True)
class NF4Options:
    """`[quantization]` with `name = "nf4"`.

    Attributes:
        double_quant: Store the blocks' scales in 8 bits too: 4.13 bits a weight, not 4.5.
        block_size: Weights that share a scale.
    """

    double_quant: bool = True
    block_size: int = field(default=64, validator=in_(BLOCK_SIZES))


def quantize_nf4(
    linear: nn.Linear, weight: torch.Tensor, options: NF4Options, compute_dtype: torch.dtype
) -> nn.Module:
    """See `lorakit_bitsandbytes.nf4`."""
    _check("nf4", weight, compute_dtype)
    from lorakit_bitsandbytes.nf4 import NF4Linear

    return NF4Linear(linear, weight, options, compute_dtype)


def nf4_bytes(shape: tuple[int, ...], options: NF4Options) -> int:
    """Of codes and scales, and with double quantization those scales' own."""
    count = math.prod(shape)
    blocks = math.ceil(count / options.block_size)
    codes = math.ceil(count / 2)
    if not options.double_quant:
        return codes + 4 * blocks
    table_and_offset = 4 * 256 + 4
    return codes + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + table_and_offset


def quantize_int8(
    linear: nn.Linear, weight: torch.Tensor, options: NoOptions, compute_dtype: torch.dtype
) -> nn.Module:
    """See `lorakit_bitsandbytes.int8`."""
    _check("int8", weight, compute_dtype)
    from lorakit_bitsandbytes.int8 import Int8Linear

    return Int8Linear(linear, weight, compute_dtype)


def int8_bytes(shape: tuple[int, ...], options: NoOptions) -> int:
    """Of codes, and a scale a row."""
    return math.prod(shape) + 4 * shape[0]


def _check(name: str, weight: torch.Tensor, compute_dtype: torch.dtype) -> None:
    import torch

    known = (torch.float32, torch.bfloat16, torch.float16)
    for what, dtype in (("weights stored", weight.dtype), ("products", compute_dtype)):
        if dtype not in known:
            names = listing(str(d).removeprefix("torch.") for d in known)
            raise UserError(
                f"quantization.name: {name} takes {what} in {names}, "
                f"not in {str(dtype).removeprefix('torch.')}",
                "Choose another precision, or leave [quantization] out.",
            )
