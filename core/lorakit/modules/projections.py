"""Linear layers that share an input, computed together and kept little of for the backward pass.

Plain autograd keeps, for each adapted layer, its input, the dropped input, and the products of
both low-rank factors.  Here the layers of a group keep their common input and, for each, the
`[T, r]` product with the first factor.  Kernels that a plugin brings may compute a layer and its
update in one go.

Source of the idea: Unsloth's and Axolotl's LoRA kernels, which do the same for q, k, v and the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from attrs import frozen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lorakit.arena import empty
from lorakit.kernel_protocol import Kernels
from lorakit.modules.low_rank import LowRank, low_ranks_of, trained
from lorakit.modules.matmul import (
    add_times,
    in_rows,
    kernels_for_such,
    times,
    times_transposed,
    transposed_times,
)
from lorakit.modules.narrow import factor_dtype, factor_of
from lorakit.modules.row_norms import norms_of


def projections(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """x `[T, in]` through each of the layers -> `[T, out]` each."""
    parts = low_ranks_of(linears)
    if parts is None:
        return tuple(linear(x) for linear in linears)
    ys: tuple[Tensor, ...] = _Projections.apply(x, parts, *trained(parts))
    return ys


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: list[LowRank], *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        results = forward_products(parts, x)
        ctx.parts = parts
        ctx.save_for_backward(x, *(t for result in results for t in result.kept))
        return tuple(result.y for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        dx, gradients = backward_products(ctx.parts, x, dys, kept, wanted=ctx.needs_input_grad[0])
        return dx, None, *gradients


KEPT = 4
"""Tensors a product keeps for its backward pass; None in the place of those it does not need."""


@frozen(eq=False)
class Product:
    """A layer's result and what its backward pass needs.

    Attributes:
        y: `[T, out]`.
        kept: s x A^T `[T, r]`; which inputs were dropped `[T, in]`; y; and, with a magnitude,
            the rows' ratio m / ||W + s B A|| `[out]`.  None where there is no such thing.
    """

    y: Tensor
    kept: tuple[Tensor | None, ...]

    @property
    def dropped(self) -> Tensor | None:
        return self.kept[1]


def forward_products(
    parts: Sequence[LowRank], x: Tensor, dropped: Sequence[Tensor | None] = ()
) -> list[Product]:
    """The forward pass of layers that share an input.

    Args:
        parts: The layers.
        x: Their input `[T, in]`.
        dropped: Which inputs an earlier pass has dropped for each, to repeat it.
    """
    lows: Sequence[Tensor | None] = [None] * len(parts)
    kernels = _adapting(parts, x, dropped)
    if kernels is None and _together(parts, dropped):
        # One product with all first factors: each is thin, and x is read once.
        downs = torch.cat([cast(Tensor, part.down).to(x.dtype) for part in parts])
        lows = times_transposed(x, downs).split(_ranks(parts), dim=1)
    again = dropped or [None] * len(parts)
    return [
        _forward_product(part, x, mask, low, kernels)
        for part, mask, low in zip(parts, again, lows, strict=True)
    ]


def _drops(parts: Sequence[LowRank], dropped: Sequence[Tensor | None]) -> bool:
    return any(part.dropout for part in parts) or any(mask is not None for mask in dropped)


def _together(parts: Sequence[LowRank], dropped: Sequence[Tensor | None]) -> bool:
    """Whether the thin products of several layers with their input are one: all have factors, and
    nothing is dropped."""
    all_have = all(part.down is not None for part in parts)
    return len(parts) > 1 and all_have and not _drops(parts, dropped)


def _adapting(
    parts: Sequence[LowRank], x: Tensor, dropped: Sequence[Tensor | None]
) -> Kernels | None:
    """What computes each of the layers in one go, its update included, if anything does; of fake
    tensors, what would."""
    kernels = kernels_for_such(x)
    if kernels is None or _drops(parts, dropped):
        return None
    for part in parts:
        if part.down is None or not kernels.adapts(len(x), factor_dtype(part.base, x)):
            return None
    return kernels


def _adapt(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    part: LowRank,
    ratio: Tensor | None,
    out: Tensor,
) -> Tensor:
    down, up = factors(part, x)
    if isinstance(x, FakeTensor):
        # Only what is allocated counts.
        return x.new_empty(len(x), len(down))
    return kernels.adapt(in_rows(x), in_rows(weight), down, up, part.scale, out, ratio=ratio)


def ratio_of(part: LowRank, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """m / ||W + s B A|| `[out]`, of a layer that has a magnitude and this W."""
    if part.magnitude is None:
        return None
    return (part.magnitude / norms_of(part, weight)).to(dtype)


def _ranks(parts: Sequence[LowRank]) -> list[int]:
    return [len(cast(Tensor, part.down)) for part in parts]


def factors(part: LowRank, x: Tensor) -> tuple[Tensor, Tensor]:
    """A and B, contiguous; they may be wider than the activations (fp32 beside bf16)."""
    down, up = cast(Tensor, part.down), cast(Tensor, part.up)
    if down.dtype != x.dtype:
        # Not where it changes nothing: it is a call for each layer, and so takes time.
        down, up = down.to(x.dtype), up.to(x.dtype)
    return down.contiguous(), up.contiguous()


def _forward_product(
    part: LowRank,
    x: Tensor,
    dropped: Tensor | None,
    low: Tensor | None,
    kernels: Kernels | None,
) -> Product:
    """One layer's; `low` is x A^T, if it is there already."""
    weight = factor_of(part.base, x)
    bias = getattr(part.base, "bias", None)
    ratio = ratio_of(part, weight, x.dtype)
    if kernels is not None:
        y = empty((len(x), len(weight)), x)
        low = _adapt(kernels, x, weight, part, ratio, y)
    else:
        y = times_transposed(x, weight)
        if part.down is not None:
            down, up = factors(part, x)
            if low is None:
                if dropped is None:
                    dropped = dropped_inputs(x, part.dropout)
                low = times_transposed(without(x, dropped, part.dropout), down)
            low.mul_(part.scale)
            add_times(y, low, up.t())
        if ratio is not None:
            y.mul_(ratio)
    if bias is not None:
        y.add_(bias.to(x.dtype))
    return Product(y, (low, dropped, y if ratio is not None else None, ratio))


def backward_products(
    parts: Sequence[LowRank],
    x: Tensor,
    dys: Sequence[Tensor],
    kept: Sequence[Tensor | None],
    *,
    wanted: bool = True,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The backward pass of layers that share an input.

    Args:
        parts: The layers.
        x: Their input `[T, in]`.
        dys: The gradients of their results `[T, out]`.
        kept: What each kept, one after the other; see `Product`.
        wanted: Whether anybody needs the input's gradient.

    Returns:
        The gradient of x, and those of each layer's A, B and m.
    """
    dropped = kept[1 : KEPT * len(parts) : KEPT]
    kernels = _adapting(parts, x, dropped)
    if kernels is not None:
        return _backward_by_kernels(kernels, parts, x, dys, kept, wanted=wanted)
    dx: Tensor | None = None
    found = []
    for index, (part, dy) in enumerate(zip(parts, dys, strict=True)):
        mine = kept[KEPT * index : KEPT * (index + 1)]
        dx, of_part = _backward_product(part, dy, mine, dx, wanted=wanted)
        found.append(of_part)
    lows = [of_part.low for of_part in found]
    if _together(parts, dropped):
        downs = torch.cat([cast(Tensor, part.down).to(x.dtype) for part in parts])
        low = torch.cat(cast("list[Tensor]", lows), dim=1)
        d_downs: Sequence[Tensor | None] = transposed_times(low, x).split(_ranks(parts))
        if dx is not None:
            add_times(dx, low, downs)
    else:
        d_downs = [
            None if low is None else _through_first_factor(part, x, low, mask, dx)
            for part, low, mask in zip(parts, lows, dropped, strict=True)
        ]
    gradients: list[Tensor | None] = []
    for part, of_part, d_down in zip(parts, found, d_downs, strict=True):
        of_down = None if d_down is None else d_down.to(cast(Tensor, part.down).dtype)
        gradients += [of_down, of_part.up, of_part.magnitude]
    return dx, gradients


def _backward_by_kernels(
    kernels: Kernels,
    parts: Sequence[LowRank],
    x: Tensor,
    dys: Sequence[Tensor],
    kept: Sequence[Tensor | None],
    *,
    wanted: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    dx = empty(x.shape, x) if wanted else None
    gradients: list[Tensor | None] = []
    for index, (part, dy) in enumerate(zip(parts, dys, strict=True)):
        low, _, y, ratio = kept[KEPT * index : KEPT * (index + 1)]
        weight = in_rows(factor_of(part.base, dy))
        down, up = factors(part, x)
        assert low is not None
        if isinstance(x, FakeTensor):
            d_down, d_up = torch.empty_like(down), torch.empty_like(up)
        else:
            d_down, d_up = kernels.adapt_backward(
                in_rows(dy), in_rows(x), low, weight, down, up, part.scale, dx,
                add=index > 0, ratio=ratio,
            )  # fmt: skip
        of_factors = [
            gradient.to(factor.dtype)
            for gradient, factor in zip((d_down, d_up), (part.down, part.up), strict=True)
            if factor is not None
        ]
        gradients += [*of_factors, _of_magnitude(part, dy, y)]
    return dx, gradients


@frozen(eq=False)
class _Gradients:
    """Those of s x A^T `[T, r]`, times s, of B and of m; None where there is no such thing."""

    low: Tensor | None = None
    up: Tensor | None = None
    magnitude: Tensor | None = None


def _of_magnitude(part: LowRank, dy: Tensor, y: Tensor | None) -> Tensor | None:
    """The gradient of m."""
    if y is None or part.magnitude is None:
        return None
    bias = getattr(part.base, "bias", None)
    inner = y if bias is None else y - bias.to(y.dtype)
    return of_magnitude(part, (dy * inner).sum(dim=0, dtype=part.magnitude.dtype))


def of_magnitude(part: LowRank, summed: Tensor | None) -> Tensor | None:
    """The gradient of m, given the sums over tokens of dy y `[out]`, y without its bias."""
    if part.magnitude is None or summed is None:
        return None
    # y = m z, so sum(dy z) = sum(dy y) / m; a row of length 0 gives 0 and not 0/0.
    return torch.where(part.magnitude == 0, 0, summed.to(part.magnitude.dtype) / part.magnitude)


def _backward_product(
    part: LowRank,
    dy: Tensor,
    kept: Sequence[Tensor | None],
    dx: Tensor | None,
    *,
    wanted: bool,
) -> tuple[Tensor | None, _Gradients]:
    """One layer's, but for its first factor; `dx` is the input's gradient so far, and may be
    written over."""
    low, _, y, ratio = kept
    d_magnitude = _of_magnitude(part, dy, y)
    if wanted:
        dx = times(dy, factor_of(part.base, dy), plus=dx, scale=ratio)
    if low is None or part.up is None:
        return dx, _Gradients(magnitude=d_magnitude)
    up = part.up.to(dy.dtype)
    d_up = transposed_times(low, dy).t()
    if ratio is not None:
        # What is thin is scaled, in the place of dy.
        up, d_up = up * ratio.unsqueeze(1), d_up * ratio.unsqueeze(1)
    d_low = times(dy, up).mul_(part.scale)
    return dx, _Gradients(d_low, d_up.to(part.up.dtype), d_magnitude)


def _through_first_factor(
    part: LowRank, x: Tensor, d_low: Tensor, dropped: Tensor | None, dx: Tensor | None
) -> Tensor:
    """The gradient of A; adds to dx, if there is one, what comes to x by A."""
    if dx is not None:
        down = cast(Tensor, part.down).to(d_low.dtype)
        if dropped is None:
            add_times(dx, d_low, down)
        else:
            dx.add_(without(times(d_low, down), dropped, part.dropout))
    return transposed_times(d_low, without(x, dropped, part.dropout))


def dropped_inputs(x: Tensor, share: float) -> Tensor | None:
    """Which inputs dropout sets to 0 `[T, in]`; None without dropout.

    Draws what torch.nn.functional.dropout draws on a CPU, so that a seed gives the same run on
    the plain path.
    """
    if share == 0.0:
        return None
    return torch.empty_like(x).bernoulli_(1 - share) == 0


def without(x: Tensor, dropped: Tensor | None, share: float) -> Tensor:
    """x without what is dropped, the rest scaled up by 1 / (1 - share)."""
    return x if dropped is None else x.masked_fill(dropped, 0).mul_(1 / (1 - share))
