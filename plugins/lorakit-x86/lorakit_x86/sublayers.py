"""Halves of blocks in one call each; see `lorakit.sublayer_protocol.SublayerKernels`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lorakit.sublayer_protocol import FactorGradients, Heads, Made, Sublayer, Work
from lorakit_x86.arguments import layer, places, threads


class NativeSublayers:
    """See `lorakit.sublayer_protocol.SublayerKernels`.

    Args:
        native: What is compiled.
        units: What computes.
    """

    def __init__(self, native: ModuleType, units: int) -> None:
        self.native, self.units = native, units

    def feed_forward(
        self, x: Tensor, half: Sublayer, made: Made, out: Tensor, work: Work
    ) -> Tensor:
        kept = x.new_empty(_small_numbers(x, half))
        given = self._given(x, half, (), made, kept, work)
        self.native.feed_forward(given, x.data_ptr(), out.data_ptr())
        return kept

    def feed_forward_backward(
        self,
        dout: Tensor,
        x: Tensor,
        half: Sublayer,
        made: Made,
        kept: Tensor,
        dx: Tensor | None,
        work: Work,
        *,
        again: bool,
    ) -> list[FactorGradients]:
        given = self._given(x, half, (), made, kept, work, again=again)
        gradients = _gradients(half)
        self.native.feed_forward_backward(given, *_backward_places(dout, x, dx, gradients))
        return gradients

    def self_attention(
        self,
        x: Tensor,
        half: Sublayer,
        heads: Heads,
        made: Made,
        attended: Tensor,
        out: Tensor,
        workspace: Tensor,
        work: Work,
    ) -> Tensor:
        numbers = _small_numbers(x, half)
        kept = x.new_empty(numbers + heads.heads * len(heads.documents.places))
        attending = _attending(heads, attended, kept[numbers:], workspace)
        given = self._given(x, half, attending, made, kept, work)
        self.native.self_attention(given, x.data_ptr(), out.data_ptr())
        return kept

    def self_attention_backward(
        self,
        dout: Tensor,
        x: Tensor,
        half: Sublayer,
        heads: Heads,
        made: Made,
        attended: Tensor,
        kept: Tensor,
        dx: Tensor | None,
        workspace: Tensor,
        work: Work,
        *,
        again: bool,
    ) -> list[FactorGradients]:
        attending = _attending(heads, attended, kept[_small_numbers(x, half) :], workspace)
        given = self._given(x, half, attending, made, kept, work, again=again)
        gradients = _gradients(half)
        self.native.self_attention_backward(given, *_backward_places(dout, x, dx, gradients))
        return gradients

    def _given(
        self,
        x: Tensor,
        half: Sublayer,
        attending: tuple[object, ...],
        made: Made,
        kept: Tensor,
        work: Work,
        *,
        again: bool = False,
    ) -> tuple[object, ...]:
        *inner, outer = (
            layer(len(x), each.weight, each.down, each.up, each.scale, each.ratio)
            for each in (*half.inner, half.outer)
        )
        whole = half.norm.data_ptr(), half.eps, *x.shape, tuple(inner), outer
        outer_made = 0 if made.outer is None else made.outer.data_ptr()
        memory = made.inner.data_ptr(), again, outer_made, kept.data_ptr(), _working(work)
        return (self.units, whole, attending, *memory, *threads())


def _working(work: Work) -> tuple[int, ...]:
    memory = work.input, work.outer, work.dmade, work.rotated, work.low
    return tuple(0 if each is None else each.data_ptr() for each in memory)


def _small_numbers(x: Tensor, half: Sublayer) -> int:
    """The norm's roots, and thin products."""
    return len(x) * (1 + sum(len(each.down) for each in (*half.inner, half.outer)))


def _gradients(half: Sublayer) -> list[FactorGradients]:
    return [
        FactorGradients(
            torch.empty_like(each.down),
            torch.empty_like(each.up),
            None if each.ratio is None else torch.empty_like(each.ratio),
        )
        for each in (*half.inner, half.outer)
    ]


def _backward_places(
    dout: Tensor, x: Tensor, dx: Tensor | None, gradients: list[FactorGradients]
) -> tuple[object, ...]:
    of_factors = tuple(
        tuple(0 if x is None else x.data_ptr() for x in (each.down, each.up, each.sums))
        for each in gradients
    )
    return dout.data_ptr(), x.data_ptr(), 0 if dx is None else dx.data_ptr(), of_factors


def _attending(
    heads: Heads, attended: Tensor, normalizer: Tensor, workspace: Tensor
) -> tuple[object, ...]:
    angles = heads.cos.data_ptr(), heads.sin.data_ptr(), heads.cos.stride(0), heads.cos.shape[-1]
    documents = heads.documents
    nowhere = 0, 0
    return (
        angles,
        (
            *nowhere,
            *nowhere,
            *nowhere,
            *(x.data_ptr() for x in (attended, normalizer, workspace)),
            heads.heads,
            heads.kv_heads,
            heads.head_dim,
            heads.scale,
            *places(documents.places)[:1],
            *places(documents.lengths)[:1],
            len(documents.lengths),
        ),
    )
