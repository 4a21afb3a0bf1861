"""Linear layers that share an input, computed together and kept little of for the backward pass.

A linear layer here is what it computes, not what class it is of: a frozen weight in whatever
form it is stored, and beside it a low-rank update, or none.  A module that can say so of itself,
by a method `low_rank()`, takes the fast path, whichever plugin it comes from; all others are
called one after the other, which is also what the fast path is tested against.

Plain autograd keeps, for each adapted layer, its input, the dropped input, and the products of
both low-rank factors.  Here the layers of a group keep their common input and, for each, the
`[T, r]` product with the first factor.

Source of the idea: Unsloth's and Axolotl's LoRA kernels, which do the same for q, k, v and the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.modules.matmul import add_times, times, times_transposed, transposed_times
from lorakit.modules.narrow import factor_of
from lorakit.modules.row_norms import norms_of


@frozen(eq=False)
class LowRank:
    """y = W x + b + s B A dropout(x), each row scaled by m / ||W + s B A|| if there is an m.

    Attributes:
        base: Holds W `[out, in]` and b: an `nn.Linear`, or a module with `dequantize(out=)`.
        down: A `[r, in]`; None where nothing is trained.
        up: B `[out, r]`.
        scale: s.
        dropout: Share of the update's input that is dropped now: 0 in evaluation.
        magnitude: m `[out]` (DoRA), which scales all but b.
        squared_norms: `[out]`, ||W||^2 of each row, where there is a magnitude.
    """

    base: nn.Module
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    magnitude: Tensor | None = None
    squared_norms: Tensor | None = None


_switch = {"on": True}


@contextmanager
def plain_path() -> Iterator[None]:
    """Within it, everything is computed by plain autograd."""
    before = set_fused(False)
    try:
        yield
    finally:
        set_fused(before)


def set_fused(on: bool) -> bool:
    """Turns the fast path of the whole process on or off; returns what it was."""
    before, _switch["on"] = _switch["on"], on
    return before


def fused_now() -> bool:
    """Whether a backward pass that keeps little is wanted: not where nothing is kept anyway, nor
    under a compiler, which fuses on its own."""
    return _switch["on"] and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def low_rank_of(linear: nn.Module) -> LowRank | None:
    """What a linear layer computes, if it is of this kind."""
    describe = getattr(linear, "low_rank", None)
    if describe is not None:
        found: LowRank | None = describe()
        return found
    if type(linear) is nn.Linear:
        return None if linear.weight.requires_grad else LowRank(linear)
    return LowRank(linear) if hasattr(linear, "dequantize") else None


def low_ranks_of(linears: Sequence[nn.Module]) -> list[LowRank] | None:
    """That of each, if all are of this kind and the fast path is wanted."""
    if not fused_now():
        return None
    found = [low_rank_of(linear) for linear in linears]
    known = [low for low in found if low is not None]
    return known if len(known) == len(found) else None


def are_repeatable(linears: Sequence[nn.Module]) -> bool:
    """Whether all are of this kind, drop no inputs now, and keep nothing of what they give: it is
    then the same each time, and need not be kept by others."""
    found = [low_rank_of(linear) for linear in linears]
    return all(low and not low.dropout and low.magnitude is None for low in found)


def projections(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """x `[T, in]` through each of the layers -> `[T, out]` each."""
    parts = low_ranks_of(linears)
    if parts is None:
        return tuple(linear(x) for linear in linears)
    ys: tuple[Tensor, ...] = _Projections.apply(x, parts, *trained(parts))
    return ys


def trained(parts: Sequence[LowRank]) -> list[Tensor | None]:
    """The parameters of several layers, three each."""
    return [tensor for part in parts for tensor in (part.down, part.up, part.magnitude)]


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
    if _together(parts, dropped):
        # One product with all first factors: each is thin, and x is read once.
        downs = torch.cat([cast(Tensor, part.down).to(x.dtype) for part in parts])
        lows = times_transposed(x, downs).split(_ranks(parts), dim=1)
    again = dropped or [None] * len(parts)
    return [
        _forward_product(part, x, mask, low)
        for part, mask, low in zip(parts, again, lows, strict=True)
    ]


def _together(parts: Sequence[LowRank], dropped: Sequence[Tensor | None]) -> bool:
    """Whether the thin products of several layers with their input are one: all have factors, and
    nothing is dropped."""
    drop = any(part.dropout for part in parts) or any(mask is not None for mask in dropped)
    return len(parts) > 1 and not drop and all(part.down is not None for part in parts)


def _ranks(parts: Sequence[LowRank]) -> list[int]:
    return [len(cast(Tensor, part.down)) for part in parts]


def _forward_product(
    part: LowRank, x: Tensor, dropped: Tensor | None, low: Tensor | None
) -> Product:
    """One layer's; `low` is x A^T, if it is there already."""
    weight = factor_of(part.base, x)
    y = times_transposed(x, weight)
    bias = getattr(part.base, "bias", None)
    ratio = None
    if part.down is not None and part.up is not None:
        # The factors may be wider than the activations (fp32 beside bf16).
        down, up = part.down.to(x.dtype), part.up.to(x.dtype)
        if low is None:
            if dropped is None:
                dropped = dropped_inputs(x, part.dropout)
            low = times_transposed(without(x, dropped, part.dropout), down)
        low.mul_(part.scale)
        add_times(y, low, up.t())
        if part.magnitude is not None:
            ratio = (part.magnitude / norms_of(part, weight)).to(x.dtype)
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
    dx: Tensor | None = None
    found = []
    for index, (part, dy) in enumerate(zip(parts, dys, strict=True)):
        mine = kept[KEPT * index : KEPT * (index + 1)]
        dx, of_part = _backward_product(part, dy, mine, dx, wanted=wanted)
        found.append(of_part)
    lows = [of_part.low for of_part in found]
    dropped = kept[1 : KEPT * len(parts) : KEPT]
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


@frozen(eq=False)
class _Gradients:
    """Those of s x A^T `[T, r]`, times s, of B and of m; None where there is no such thing."""

    low: Tensor | None = None
    up: Tensor | None = None
    magnitude: Tensor | None = None


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
    d_magnitude = None
    if ratio is not None and y is not None and part.magnitude is not None:
        bias = getattr(part.base, "bias", None)
        inner = y if bias is None else y - bias.to(y.dtype)
        magnitude = part.magnitude
        # y = m z, so sum(dy z) = sum(dy y) / m; a row of length 0 gives 0 and not 0/0.
        summed = (dy * inner).sum(dim=0, dtype=magnitude.dtype)
        d_magnitude = torch.where(magnitude == 0, 0, summed / magnitude)
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
