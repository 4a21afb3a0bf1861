"""What a linear layer is to the fast path.

A linear layer here is what it computes, not what class it is of: a frozen weight in whatever
form it is stored, and beside it a low-rank update, or none.  A module that can say so of itself,
by a method `low_rank()`, takes the fast path (`lorakit.modules.projections`), whichever plugin it
comes from; all others are called one after the other, which is also what the fast path is tested
against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor, nn


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
    """Whether the fast path is wanted, which without gradients keeps nothing: not under a compiler,
    which fuses on its own."""
    return _switch["on"] and not torch.compiler.is_compiling()


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


def trained(parts: Sequence[LowRank]) -> list[Tensor | None]:
    """The parameters of several layers, three each."""
    return [tensor for part in parts for tensor in (part.down, part.up, part.magnitude)]
