"""Rotary position embedding, in Hugging Face's rotate-half layout.

Head dimension i is paired with i + R/2, so checkpoints in Hugging Face layout need no
permutation of their rows.  R is the head's width Dh, or less where only a head's first part turns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.arena import empty_like
from lorakit.modules.layout import Layout
from lorakit.modules.low_rank import fused_now
from lorakit.modules.matmul import kernels_for
from lorakit.modules.uncompiled import uncompiled


class Rotary:
    """Rotates the pairs (x_i, x_{i+R/2}) of a head by position * frequency_i.

    Args:
        frequencies: `[R/2]` radians a position, on the CPU.
        scale: Multiplies cos and sin (YaRN and LongRoPE scale attention this way).

    Reference: Su et al. 2021, arXiv 2104.09864.
    """

    switches_at: int | None = None
    """Tokens after which the whole document is rotated differently, if it ever is."""

    def __init__(self, frequencies: Tensor, scale: float = 1.0) -> None:
        self.frequencies = frequencies
        self.scale = scale

    @classmethod
    def of_base(cls, head_dim: int, base: float) -> Rotary:
        """frequency_i = base^(-2i/Dh)."""
        return cls(base_frequencies(head_dim, base))

    @uncompiled
    def tables(self, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[T, 1, R]` at the layout's positions, computed once a micro-batch."""
        return layout.derived((id(self), dtype), lambda: self._compute(layout, dtype))

    def _compute(self, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = self.angles(layout)
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return cos.to(dtype), sin.to(dtype)

    def angles(self, layout: Layout) -> Tensor:
        """`[T, R/2]`, fp32."""
        positions = layout.positions
        return torch.outer(positions.float(), self.frequencies.to(positions.device))

    def rotate(self, x: Tensor, layout: Layout) -> Tensor:
        """x `[T, H, Dh]` -> the same, its first R dimensions rotated."""
        cos, sin = self.tables(layout, x.dtype)
        if fused_now():
            whole: Tensor = _Rotation.apply(x, cos, sin)
            return whole
        turning = x[..., : cos.shape[-1]]
        half = turning.shape[-1] // 2
        turned = torch.cat([-turning[..., half:], turning[..., :half]], dim=-1)
        rotated = turning * cos + turned * sin
        if rotated.shape[-1] == x.shape[-1]:
            return rotated
        return torch.cat([rotated, x[..., rotated.shape[-1] :]], dim=-1)


class _Rotation(torch.autograd.Function):
    """`Rotary.rotate` in one pass over each half of a head, keeping nothing but the tables: the
    gradient is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, back=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """x `[T, H, Dh]`, cos and sin `[T, 1, R]`, whose two halves are alike."""
    width = cos.shape[-1]
    half = width // 2
    cos, sin = cos[..., :half], sin[..., :half]
    y = empty_like(x)
    kernels = kernels_for(x)
    if kernels is not None and one_angle_a_token(x, cos, sin) and kernels.rotates(x):
        if x.stride()[1:] != (x.shape[2], 1):
            x = x.contiguous()
        kernels.rotate(x, cos, sin, y, back=back)
        return y
    sign = -1 if back else 1
    first, second = x[..., :half], x[..., half:width]
    torch.mul(first, cos, out=y[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=y[..., half:width]).addcmul_(first, sin, value=sign)
    y[..., width:] = x[..., width:]
    return y


def one_angle_a_token(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the tables are as `Rotary.tables` makes them, and of x's dtype."""
    there = cos.shape[:2] == (len(x), 1) and cos.stride(-1) == 1
    return there and cos.stride() == sin.stride() and cos.dtype == sin.dtype == x.dtype


class LongRotary(Rotary):
    """LongRoPE: one set of frequencies for documents of up to `switches_at` tokens, another for
    all tokens of longer ones.

    The reference implementation chooses once for a whole batch, by its longest row; here each
    document goes by its own length, as it would alone.

    Args:
        short: `[R/2]` radians a position.
        long: Likewise, for longer documents.
        switches_at: The longest document that `short` is for.
        scale: Multiplies cos and sin, in both cases.

    Reference: Ding et al. 2024, arXiv 2402.13753; `rope_type: longrope` of Hugging Face configs.
    """

    switches_at: int

    def __init__(self, short: Tensor, long: Tensor, *, switches_at: int, scale: float) -> None:
        super().__init__(short, scale)
        self.long = long
        self.switches_at = switches_at

    def angles(self, layout: Layout) -> Tensor:
        """`[T, R/2]`, fp32."""
        # A token that documents share would have as many angles: see `CausalDecoder`.
        assert layout.places is None
        positions = layout.positions
        lengths = torch.tensor(layout.lengths, device=positions.device)
        # A document that a cache holds the start of does not begin at position 0.
        totals = positions[lengths.cumsum(0) - 1] + 1
        totals = totals.repeat_interleave(lengths, output_size=len(positions))
        short = self.frequencies.to(positions.device)
        long = self.long.to(positions.device)
        chosen = torch.where((totals > self.switches_at).unsqueeze(1), long, short)
        return positions.float().unsqueeze(1) * chosen


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


def yarn_frequencies(
    frequencies: Tensor,
    *,
    base: float,
    factor: float,
    original_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """YaRN: dimensions that turn fewer than `beta_slow` times over the original context are
    stretched by `factor`, those that turn more than `beta_fast` times kept, and those between
    go over linearly.

    Args:
        frequencies: `[Dh/2]` unscaled, of `base`.
        base: Theirs.
        factor: How much longer the context has become.
        original_context: Tokens of the context before.
        beta_fast: Turns.
        beta_slow: Turns.
        truncate: Widen the transition to whole dimensions.

    Reference: Peng et al. 2023, arXiv 2309.00071; `rope_type: yarn` of Hugging Face configs.
    """
    dim = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """Of the pair that turns so many times over the original context."""
        return dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    stretched = ramp.clamp(0.0, 1.0)
    return frequencies / factor * stretched + frequencies * (1 - stretched)


def yarn_scale(factor: float) -> float:
    """What YaRN multiplies cos and sin by, so that attention stays as sharp over a context
    `factor` times as long: 0.1 ln(factor) + 1."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_scale(factor: float, original_context: int) -> float:
    """What LongRoPE multiplies cos and sin by: sqrt(1 + ln(factor) / ln(original context))."""
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_context))
