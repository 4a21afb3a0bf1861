"""Normalization layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.arena import empty_like
from lorakit.modules.low_rank import fused_now
from lorakit.modules.matmul import in_rows, kernels_for


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w, the mean in fp32 whatever x is.

    Args:
        dim: D.
        eps: Keeps the root from being zero.
        unit_offset: The weight is stored as its difference from 1, so 1 + w is applied, in fp32.

    Reference: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]` -> `[..., D]`."""
        if self.unit_offset:
            wide = F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps)
            return wide.to(x.dtype)
        if x.dtype == torch.float32:
            if fused_now() and not self.weight.requires_grad:
                y: Tensor = _Normalized.apply(x, self.weight.to(x.dtype), self.eps)
                return y
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        # Normalized in fp32 and cast before the weight is applied, as the reference models do.
        wide = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


class _Normalized(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and g = dy * w: dx = r g - x r^3 <g, x> / D.

    Autograd takes three times as long for the many small operations that this consists of.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.kernels = kernels_for(x) if x.dim() > 1 else None
        if ctx.kernels is not None:
            rows = in_rows(x.flatten(0, -2))
            if ctx.kernels.normalizes(rows):
                y = empty_like(x)
                kept = ctx.kernels.normalize(rows, weight, eps, y.flatten(0, -2))
                ctx.save_for_backward(x, kept, weight)
                return y
            ctx.kernels = None
        dim = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        root = norm.square_().div_(dim).add_(eps).rsqrt_()
        ctx.save_for_backward(x, root, weight)
        return (x * root).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, root, weight = ctx.saved_tensors
        if ctx.kernels is not None:
            dx = empty_like(x)
            rows = (in_rows(each.flatten(0, -2)) for each in (dy, x))
            ctx.kernels.normalize_backward(*rows, weight, root, dx.flatten(0, -2))
            return dx, None, None
        g = dy * weight
        along = torch.linalg.vecdot(g, x).unsqueeze(-1)
        along.mul_(root.pow(3)).div_(-x.shape[-1])
        return g.mul_(root).addcmul_(x, along), None, None
