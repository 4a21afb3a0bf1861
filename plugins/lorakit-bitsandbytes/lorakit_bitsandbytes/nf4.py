"""NF4 storage, bit for bit bitsandbytes'.

Each block of weights is divided by its largest magnitude, and each weight stored as the number
of the nearest of 16 levels, two to a byte.  Reference: Dettmers et al. 2023, arXiv 2305.14314.

The two conversions are bitsandbytes' wherever it has a fast one.  On a CPU it quantizes by a
binary search for each weight, which takes minutes for a 7B model, and gives each dequantized
weight in new memory, whose first touch costs more than the conversion; here quantizing goes through
pieces that fit the caches, and dequantizing writes to the buffer at hand, with the very same
results.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.modules.frozen import StoredLinear, has_memory
from lorakit_bitsandbytes import library
from lorakit_bitsandbytes.native import dequantizer
from lorakit_bitsandbytes.quantizations import NESTED_BLOCK

if TYPE_CHECKING:
    from lorakit_bitsandbytes.quantizations import NF4Options

QUANTIZE_PIECE = 1 << 16
"""Weights quantized at once: half a megabyte of intermediate values."""
DEQUANTIZE_PIECE = 1 << 20
ROW = 4096
"""The native kernel shares rows out to threads; a multiple of every block size."""
LARGEST_NATIVE_BLOCK = 1024
"""Above it, on some CPUs, bitsandbytes leaves its native kernel."""


class NF4Linear(StoredLinear):
    """A linear layer whose weight is kept in NF4.

    Args:
        linear: Gives the sizes and the bias.
        weight: `[out, in]`, in fp32, bf16 or fp16.
        options: Block size, and whether scales are quantized too.
        compute_dtype: Of `dequantize`.

    Everything stored is a buffer, so that `.to(device)` moves it: `packed` uint8 `[n/2, 1]`;
    `absmax`, the blocks' scales `[n/block]`, fp32, or with double quantization uint8, and then
    `absmax_code` `[256]`, `absmax_scale` (a scale for each 256 scales) and `absmax_offset`.

    Raises:
        UserError: The weight is not finite.
    """

    packed: Tensor
    absmax: Tensor
    absmax_code: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor

    def __init__(
        self, linear: nn.Linear, weight: Tensor, options: NF4Options, compute_dtype: torch.dtype
    ) -> None:
        super().__init__(linear, compute_dtype)
        library.load()
        self.block_size, self.double_quant = options.block_size, options.double_quant
        packed, absmax = quantize_blocks(weight, options.block_size)
        if has_memory(weight) and not absmax.isfinite().all():
            raise UserError("the weight has values that are not finite, which nf4 cannot hold")
        self.register_buffer("packed", packed)
        if options.double_quant:
            offset = absmax.mean()
            code = torch.tensor(_dynamic_map(), dtype=torch.float32, device=weight.device)
            absmax, scale = torch.ops.bitsandbytes.quantize_blockwise.default(
                absmax - offset, code, NESTED_BLOCK
            )
            self.register_buffer("absmax_code", code)
            self.register_buffer("absmax_scale", scale)
            self.register_buffer("absmax_offset", offset)
        self.register_buffer("absmax", absmax)

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """W `[out, in]`: level times scale, in fp32, rounded once to the dtype asked for."""
        shape = (self.out_features, self.in_features)
        if out is None and has_memory(self.packed) and self.packed.device.type == "cpu":
            out = torch.empty(shape, dtype=self.compute_dtype)
        dtype = self.compute_dtype if out is None else out.dtype
        arguments: Any = (self.packed, self.scales(), self.block_size, "nf4", shape, dtype)
        if out is None:
            whole: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
            return whole
        if out.device.type == "cpu":
            return _dequantize_pieces(self.packed, self.scales(), self.block_size, out)
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
        return out

    def scales(self) -> Tensor:
        """The largest magnitude of each block `[n/block]`, fp32."""
        if not self.double_quant:
            return self.absmax
        centred: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
            self.absmax, self.absmax_scale, self.absmax_code, NESTED_BLOCK, torch.float32
        )
        return centred + self.absmax_offset

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nf4, block_size={self.block_size}"


@cache
def _dynamic_map() -> tuple[float, ...]:
    """bitsandbytes' 8-bit levels, as numbers: a tensor made now might be a fake one."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("cpu"):
        return tuple(library.load().functional.create_dynamic_map().tolist())


@cache
def _levels() -> Any:
    """The 16 levels, ascending, fp32."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return library.load().functional.get_4bit_type("nf4", device="cpu").numpy()


def quantize_blocks(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """A weight of any shape -> codes uint8 `[n/2, 1]`, the first in the high bits, and the
    blocks' scales fp32 `[n/block]`; equals `bitsandbytes.functional.quantize_4bit`."""
    if weight.device.type == "cpu" and has_memory(weight):
        return _quantize_pieces(weight.detach().reshape(-1), block_size)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
        weight, block_size, "nf4", torch.uint8
    )
    return packed, absmax


def _quantize_pieces(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """flat `[n]`, any float.  A code is the number of level midpoints below the scaled weight,
    counted by 15 comparisons over a whole piece, which is faster than any search."""
    count = flat.numel()
    absmax = torch.empty(-(-count // block_size))
    packed = numpy.empty(-(-count // 2), numpy.uint8)
    for start in range(0, count, QUANTIZE_PIECE):
        piece = flat[start : start + QUANTIZE_PIECE].float()
        scales = absmax[start // block_size :][: -(-len(piece) // block_size)]
        codes = _codes(_scaled(piece, block_size, scales))
        packed[start // 2 :][: len(codes) // 2] = (codes[::2] << 4) | codes[1::2]
    return torch.from_numpy(packed).unsqueeze(1), absmax


def _scaled(piece: Tensor, block_size: int, scales: Tensor) -> Tensor:
    """The piece `[m]` over its blocks' largest magnitudes, which are written to `scales`; an
    even number of values."""
    whole = len(piece) // block_size
    blocks = piece[: whole * block_size].view(whole, block_size)
    scales[:whole] = blocks.abs().amax(dim=-1)
    parts = [(blocks * (1.0 / scales[:whole].clamp(min=1e-38)).view(-1, 1)).view(-1)]
    rest = piece[whole * block_size :]
    if len(rest):
        # bitsandbytes divides in a last block that is not full, and multiplies in the others.
        scales[whole] = rest.abs().amax().clamp(min=1e-38)
        parts.append(rest / scales[whole])
    if len(rest) % 2:
        parts.append(torch.zeros(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _codes(scaled: Tensor) -> Any:
    """scaled `[m]` -> uint8 `[m]`."""
    values, levels = scaled.numpy(), _levels()
    codes = numpy.full(len(values), 15, numpy.uint8)
    not_above = numpy.empty(len(values), numpy.bool_)
    for midpoint in (levels[:-1] + levels[1:]) / 2:
        numpy.less_equal(values, midpoint, out=not_above)
        numpy.subtract(codes, not_above.view(numpy.uint8), out=codes)
    return codes


def _dequantize_pieces(packed: Tensor, scales: Tensor, block_size: int, out: Tensor) -> Tensor:
    """Writes to out `[out, in]`, contiguous; returns it."""
    if block_size > LARGEST_NATIVE_BLOCK:
        scales = scales.repeat_interleave(block_size // LARGEST_NATIVE_BLOCK)
        block_size = LARGEST_NATIVE_BLOCK
    flat = out.view(-1)
    native, done = dequantizer(out.dtype), 0
    if native is not None:
        done = len(flat) - len(flat) % ROW
        native(packed, scales, block_size, flat[:done].view(-1, ROW))
    for start in range(done, len(flat), DEQUANTIZE_PIECE):
        target = flat[start : start + DEQUANTIZE_PIECE]
        # The native kernel wants even rows; the last byte of an odd weight has a second half.
        count = len(target) + len(target) % 2
        width = ROW if count % ROW == 0 else count
        values = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed[start // 2 : (start + count) // 2],
            scales[start // block_size : -(-(start + count) // block_size)],
            block_size,
            "nf4",
            (count // width, width),
            out.dtype,
        )
        target.copy_(values.view(-1)[: len(target)])
    return out
