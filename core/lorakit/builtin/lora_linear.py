"""The layer LoRA puts in a linear's place."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.modules.low_rank import LowRank
from lorakit.modules.row_norms import row_norms


class LoRALinear(nn.Module):
    """y = W x + b + s B A dropout(x), with W and b frozen.

    A starts as a linear layer's weight does (Kaiming uniform with a = sqrt 5), B at zero, so
    that training starts from the base model.

    With DoRA, y = m / ||W + s B A|| (W x + s B A x) + b: the norm of each output row is taken
    over the input and, as the paper has it, counts as a constant in the backward pass.  It
    needs no dense B A: per row, ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>.
    Dropout applies to the adapter's input only; the base sees the input whole.

    Args:
        base: The frozen linear, quantized or not.
        rank: r.
        scale: s.
        dropout: Share of inputs dropped in training.
        dora: Train magnitudes.

    The parameters' names and shapes are PEFT's: `lora_A.weight` `[r, in]`, `lora_B.weight`
    `[out, r]`, `lora_magnitude_vector` `[out]`.
    """

    def __init__(
        self, base: nn.Module, *, rank: int, scale: float, dropout: float, dora: bool
    ) -> None:
        super().__init__()
        self.base = base
        inputs, outputs = cast(int, base.in_features), cast(int, base.out_features)
        self.in_features, self.out_features = inputs, outputs
        # Drawn on the CPU, so that a seed gives the same start on every device.
        self.lora_A = nn.Linear(inputs, rank, bias=False, device="cpu", dtype=torch.float32)
        self.lora_B = nn.Linear(rank, outputs, bias=False, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.scale = scale
        self.dropout = dropout
        self.lora_magnitude_vector: nn.Parameter | None = None
        self._base_norms: Tensor | None = None
        if dora:
            # B is zero, so the rows' lengths are those of W.
            self.lora_magnitude_vector = nn.Parameter(self.base_squared_norms().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """x `[T, in]` -> `[T, out]`."""
        base: Tensor = self.base(x)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        # The adapter's parameters may be wider than the activations (fp32 beside bf16).
        low = dropped @ self.lora_A.weight.to(x.dtype).t()
        if self.lora_magnitude_vector is None:
            return base + (low @ self.lora_B.weight.to(x.dtype).t()) * self.scale
        update = (low @ self.lora_B.weight.to(x.dtype).t()) * self.scale
        ratio = (self.lora_magnitude_vector / self.row_norms()).to(x.dtype)
        bias = cast("Tensor | None", getattr(self.base, "bias", None))
        if bias is None:
            return (base + update) * ratio
        return (base - bias + update) * ratio + bias

    def low_rank(self) -> LowRank:
        """The same as numbers, for the fast path of layers that share an input."""
        return LowRank(
            base=self.base,
            down=self.lora_A.weight,
            up=self.lora_B.weight,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            magnitude=self.lora_magnitude_vector,
            squared_norms=None if self.lora_magnitude_vector is None else self.base_squared_norms(),
        )

    def row_norms(self) -> Tensor:
        """||W + s B A|| for each output row `[out]`, fp32."""
        return row_norms(self.low_rank(), self._weight())

    @torch.no_grad()
    def base_squared_norms(self) -> Tensor:
        """||W||^2 for each output row `[out]`, computed once."""
        if self._base_norms is None:
            self._base_norms = self._weight().float().square().sum(dim=1)
        return self._base_norms

    def _weight(self) -> Tensor:
        """The frozen weight `[out, in]`; a quantized layer gives it dequantized."""
        dequantize = getattr(self.base, "dequantize", None)
        return cast(Tensor, dequantize() if dequantize else self.base.weight)
