"""Normalization layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        # Normalized in fp32 and cast before the weight is applied, as the reference models do.
        wide = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)
