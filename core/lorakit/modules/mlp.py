"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.modules.gated import gated


class GatedMLP(nn.Module):
    """y = down(act(gate(x)) * up(x)).

    Attributes:
        recompute: Compute both inner products again in the backward pass.

    Reference: Shazeer 2020, arXiv 2002.05202 (SwiGLU where act is SiLU).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor],
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)
        self.activation = activation
        self.recompute = False

    @property
    def inner(self) -> tuple[nn.Module, ...]:
        """What gives g and u."""
        return self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        return gated(x, self.inner, self.down_proj, self.activation, recompute=self.recompute)


class FusedGatedMLP(nn.Module):
    """A `GatedMLP` whose gate and up projections are one matrix, gate's rows first."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.activation = activation
        self.recompute = False

    @property
    def inner(self) -> tuple[nn.Module, ...]:
        """What gives g and u."""
        return (self.gate_up_proj,)

    def forward(self, x: Tensor) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        return gated(x, self.inner, self.down_proj, self.activation, recompute=self.recompute)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation.  Reference: Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return F.gelu(x, approximate="tanh")
