"""Causal attention over several documents, by kernels that a plugin brings: in one call, in which
documents are not cut out, joined or put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lorakit.arena import empty_like
from lorakit.kernel_protocol import Documents, Kernels
from lorakit.modules.layout import Layout
from lorakit.modules.matmul import kernels_for_such
from lorakit.scratch import scratch


def kernels_attending(q: Tensor, k: Tensor, v: Tensor) -> Kernels | None:
    """Those in use, if they attend documents of q `[T, H, Dh]`, and k and v `[T, Hkv, Dh]`; of fake
    tensors, those that would."""
    kernels = kernels_for_such(q)
    alike = {(x.dtype, x.device) for x in (q, k, v)}
    return kernels if kernels is not None and len(alike) == 1 and kernels.attends(q, k) else None


def attend_by_kernels(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None
) -> Tensor:
    """softmax(scale q k^T) v within each document, causal.

    Args:
        kernels: What `kernels_attending` found.
        q: `[T, H, Dh]`.
        k: `[T, Hkv, Dh]`; query head h sees key head h // (H / Hkv).
        v: Like k.
        layout: The documents.
        scale: None means 1/sqrt(Dh).

    Returns:
        `[T, H, Dh]`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _AttentionByKernels.apply(kernels, q, k, v, layout, scale)
    return out


class _AttentionByKernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        documents = documents_of(layout)
        out, workspace = empty_like(q), _workspace(kernels, q, k, layout)
        inputs = [_heads_in_order(x) for x in (q, k, v)]
        if isinstance(q, FakeTensor):
            kept = q.new_empty(q.shape[1], len(documents.places))
        else:
            kept = kernels.attend(inputs[0], inputs[1], inputs[2], documents, scale, out, workspace)
        ctx.kernels, ctx.layout, ctx.scale = kernels, layout, scale
        ctx.save_for_backward(q, k, v, out, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, kept = ctx.saved_tensors
        into = empty_like(q), empty_like(k), empty_like(v)
        workspace = _workspace(ctx.kernels, q, k, ctx.layout)
        given = [_heads_in_order(x) for x in (dout, q, k, v)]
        if not isinstance(q, FakeTensor):
            documents = documents_of(ctx.layout)
            ctx.kernels.attend_backward(*given, documents, out, kept, ctx.scale, into, workspace)
        return None, *into, None, None


def _workspace(kernels: Kernels, q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    longest = max(layout.lengths)
    return attention_workspace(kernels, (q[:longest], k[:longest]), q)


def attention_workspace(kernels: Kernels, longest: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """What kernels need to attend documents, the longest of this q and k."""
    (memory,) = scratch("attention", like, ((kernels.attention_bytes(*longest),), torch.uint8))
    return memory


def documents_of(layout: Layout) -> Documents:
    """Where a micro-batch's documents lie, made once."""
    return layout.derived("documents for kernels", lambda: _documents(layout))


def _documents(layout: Layout) -> Documents:
    places = layout.places
    own = [parts[-1].stop - parts[-1].start for parts in layout.segments]
    # Kernels write where they are told to.
    assert sum(own) == len(layout.positions)
    return Documents(
        torch.arange(sum(layout.lengths)) if places is None else places,
        torch.tensor([*zip(layout.lengths, own, strict=True)], dtype=torch.int64),
    )


def _heads_in_order(x: Tensor) -> Tensor:
    """x `[T, H, Dh]`, the heads of each token one after the other."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
