"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class GatedMLP(nn.Module):
    """y = down(act(gate(x)) * up(x)).

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

    def forward(self, x: Tensor) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
