"""How exact kernels are, and what they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorakit.modules.layout import Segments
from lorakit.testing.failure import ensure

SLACK = 3.0
"""Errors in the 2-norm are at most so many times those of torch's own fp32."""


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attention_of(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, segments: Sequence[Segments]
) -> Tensor:
    """Causal attention within documents `[T, H, Dh]`, by torch."""
    results = []
    for parts in segments:
        own = parts[-1].stop - parts[-1].start
        own_q, own_k, own_v = (torch.cat([x[part] for part in parts]) for x in (q, k, v))
        whole = _document_attention(own_q, own_k, own_v, scale)
        results.append(whole[len(whole) - own :])
    return torch.cat(results)


def _document_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    queries, keys, values = (x.transpose(0, 1) for x in (q, k, v))
    keys, values = (x.repeat_interleave(shared, dim=0) for x in (keys, values))
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu_(1)
    scores = (scale * queries @ keys.transpose(1, 2)).masked_fill(hidden, float("-inf"))
    return (scores.softmax(dim=-1) @ values).transpose(0, 1)


def ensure_each_close(
    names: Sequence[str],
    found: Sequence[Tensor],
    theirs: Sequence[Tensor],
    exact: Sequence[Tensor],
    again: Sequence[Tensor],
) -> None:
    """Of several results, that none depends on the number of threads, too."""
    for name, ours, others, right, once_more in zip(
        names, found, theirs, exact, again, strict=True
    ):
        ensure_close(ours, others, right, name)
        ensure(torch.equal(ours, once_more), f"{name}: depends on the number of threads")


def ensure_close(ours: Tensor, theirs: Tensor, exact: Tensor, what: str) -> None:
    error = float((ours - exact).norm() / exact.norm().clamp_min(1e-30))
    usual = float((theirs - exact).norm() / exact.norm().clamp_min(1e-30))
    ensure(
        error <= SLACK * usual + 1e-7,
        f"{what}: an error of {error:.1e} where torch's fp32 has {usual:.1e}",
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
