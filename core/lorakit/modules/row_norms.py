"""The norms of an adapted weight's rows, which DoRA divides by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.modules.frozen import has_memory
from lorakit.modules.matmul import multiplies_as_stored, times_transposed
from lorakit.modules.narrow import NarrowLinear, weight_of

if TYPE_CHECKING:
    from lorakit.modules.low_rank import LowRank

_norms: list[dict[Tensor, Tensor]] = []


@contextmanager
def norms_kept() -> Iterator[None]:
    """Within it no parameter changes, so that rows' norms are computed once for all micro-batches,
    threads and recomputations."""
    _norms.append({})
    try:
        yield
    finally:
        _norms.pop()


def norms_of(part: LowRank, weight: Tensor) -> Tensor:
    """`row_norms`, or what they were found to be before."""
    if not _norms or part.up is None or not has_memory(weight):
        return row_norms(part, weight)
    # Two threads may compute the same; either result will do.
    found = _norms[-1].get(part.up)
    if found is None:
        found = _norms[-1][part.up] = row_norms(part, weight)
    return found


@torch.no_grad()
def row_norms(part: LowRank, weight: Tensor) -> Tensor:
    """||W + s B A|| of each row `[out]`, fp32, without the dense product B A.

    Per row, ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>: the cost of r more
    tokens.  The norm counts as a constant in the backward pass (arXiv 2402.09353, section 4.3).

    Args:
        part: With a magnitude.
        weight: W `[out, in]`, as materialized already.
    """
    assert part.down is not None
    assert part.up is not None
    assert part.squared_norms is not None
    a, b = part.down.float(), part.up.float()
    cross = (_with_rows(weight, a, part.base) * b).sum(dim=1)
    square = ((b @ (a @ a.t())) * b).sum(dim=1)
    total = part.squared_norms + 2 * part.scale * cross + part.scale**2 * square
    # Above 0, so that a row of zeros gives zeros and not 0/0.
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()


def _with_rows(weight: Tensor, a: Tensor, base: nn.Module) -> Tensor:
    """W A^T `[out, r]`, fp32; W may be in another dtype than it is to be multiplied in."""
    if multiplies_as_stored(a, weight):
        return times_transposed(a, weight).t()
    if isinstance(base, NarrowLinear) and weight is base.weight:
        weight = weight_of(base, a)
    return (weight @ a.to(weight.dtype).t()).float()
