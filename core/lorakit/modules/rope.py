"""Rotary position embedding, in Hugging Face's rotate-half layout.

Head dimension i is paired with i + Dh/2, so checkpoints in Hugging Face layout need no
permutation of their rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorakit.modules.layout import Layout


class Rotary:
    """Rotates the pairs (x_i, x_{i+Dh/2}) of a head by position * frequency_i.

    Args:
        frequencies: `[Dh/2]` radians a position, on the CPU.
        scale: Multiplies cos and sin (YaRN and LongRoPE scale attention this way).

    Reference: Su et al. 2021, arXiv 2104.09864.
    """

    def __init__(self, frequencies: Tensor, scale: float = 1.0) -> None:
        self.frequencies = frequencies
        self.scale = scale

    @classmethod
    def of_base(cls, head_dim: int, base: float) -> Rotary:
        """frequency_i = base^(-2i/Dh)."""
        return cls(base_frequencies(head_dim, base))

    def tables(self, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[T, 1, Dh]` at the layout's positions, computed once a micro-batch."""
        return layout.derived((id(self), dtype), lambda: self._compute(layout.positions, dtype))

    def _compute(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = torch.outer(positions.float(), self.frequencies.to(positions.device))
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return cos.to(dtype), sin.to(dtype)

    def rotate(self, x: Tensor, layout: Layout) -> Tensor:
        """x `[T, H, Dh]` -> the same, rotated."""
        cos, sin = self.tables(layout, x.dtype)
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * cos + turned * sin


def base_frequencies(head_dim: int, base: float) -> Tensor:
    """`[Dh/2]`: base^(-2i/Dh)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    return 1.0 / (base**exponents)


def llama3_frequencies(
    frequencies: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, and
    those between go over smoothly.

    Args:
        frequencies: `[Dh/2]` unscaled.
        factor: How much longer the context has become.
        low_freq_factor: Wavelengths over original_context/low_freq_factor are stretched.
        high_freq_factor: Wavelengths under original_context/high_freq_factor are kept.
        original_context: Tokens of the context before.

    Reference: `rope_type: llama3` of Hugging Face configs, after Meta's llama-models.
    """
    wavelengths = 2 * math.pi / frequencies
    smooth = (original_context / wavelengths - low_freq_factor) / (
        high_freq_factor - low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies
