"""int8 storage with a scale for each output row, as bitsandbytes' vectorwise quantization has it.

Reference: Dettmers et al. 2022, arXiv 2208.07339 (without its split of outlier columns, which
is for products in int8: here weights are only stored so).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.modules.frozen import StoredLinear, has_memory

PIECE = 1 << 20
"""Weights converted at once, in fp32."""


class Int8Linear(StoredLinear):
    """W = codes * absmax / 127, by row.

    Args:
        linear: Gives the sizes and the bias.
        weight: `[out, in]`, in fp32, bf16 or fp16.
        compute_dtype: Of `dequantize`.

    Buffers: `codes` int8 `[out, in]`, `absmax` fp32 `[out]`.

    Raises:
        UserError: The weight is not finite.
    """

    codes: Tensor
    absmax: Tensor

    def __init__(self, linear: nn.Linear, weight: Tensor, compute_dtype: torch.dtype) -> None:
        super().__init__(linear, compute_dtype)
        codes, absmax = _quantized(weight.detach())
        if has_memory(weight) and not absmax.isfinite().all():
            raise UserError("the weight has values that are not finite, which int8 cannot hold")
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """W `[out, in]`, computed in fp32, rounded once to the dtype asked for."""
        scales = self.absmax.unsqueeze(1)
        if out is None:
            return _product(self.codes, scales).to(self.compute_dtype)
        for rows in _pieces(out):
            out[rows] = _product(self.codes[rows], scales[rows])
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight `[out, in]` -> codes int8 `[out, in]`, absmax fp32 `[out]`."""
    if not has_memory(weight):
        return _quantized_rows(weight)
    codes = torch.empty_like(weight, dtype=torch.int8)
    absmax = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in _pieces(weight):
        codes[rows], absmax[rows] = _quantized_rows(weight[rows])
    return codes, absmax


def _quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    values = weight.float()
    absmax = values.abs().amax(dim=1)
    # A row of zeros has no scale: any finite one gives zeros.
    factors = 127.0 / absmax.clamp_min(torch.finfo(torch.float32).tiny)
    return (values * factors.unsqueeze(1)).round_().to(torch.int8), absmax


def _product(codes: Tensor, scales: Tensor) -> Tensor:
    # In bitsandbytes' own order and with its constant for 1/127, so that the bits are the same.
    return codes.float().mul_(scales).mul_(7.874015718698502e-3)


def _pieces(matrix: Tensor) -> list[slice]:
    """Runs of rows of about PIECE numbers."""
    count = max(1, PIECE // matrix.shape[1])
    return [slice(start, start + count) for start in range(0, len(matrix), count)]
