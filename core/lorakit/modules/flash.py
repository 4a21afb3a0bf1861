"""Causal attention over several documents, on a CPU, by torch's flash kernel for it.

torch's scaled_dot_product_attention keeps q, k, v and its result for each document, k and v
repeated for the query heads they serve, and joining the documents copies the results.  Called
directly, the kernel repeats nothing, and each document's result goes to its place at once.  Where
it is faster, a long document goes to `lorakit.modules.blockwise` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.modules.blockwise import attend, attend_backward, beats_kernel

_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)


# torch.__version__ compares as a version, not as text.
_shares_heads = torch.__version__ >= "2.9"
"""Before, the kernel takes k and v to have as many heads as q, and reads and writes beyond them."""


def has_flash(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel is there for q `[T, H, Dh]` and k `[T, Hkv, Dh]`.

    Source: https://github.com/pytorch/pytorch/pull/157893 (query heads that share a key head).
    """
    known = _forward is not None and _backward is not None
    return known and q.device.type == "cpu" and (_shares_heads or q.shape[1] == k.shape[1])


def flash_documents(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float | None
) -> Tensor:
    """o(softmax(scale q k^T) v) within each document, causal.

    Args:
        q: `[T, H, Dh]`.
        k: `[T, Hkv, Dh]`; query head h sees key head h // (H / Hkv).
        v: Like k.
        lengths: Of the documents; their sum is T.
        scale: None means 1/sqrt(Dh).

    Returns:
        `[T, H, Dh]`.
    """
    # A part of a larger projection would keep all of that in memory until the backward pass.
    out: Tensor = _FlashDocuments.apply(q, k, v.contiguous(), lengths, scale)
    return out


class _FlashDocuments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float | None
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.scale = q.shape[-1] ** -0.5 if scale is None else scale
        # Decided once: the backward pass of one way cannot follow the forward pass of the other.
        ctx.documents = [(part, beats_kernel(q[part], k[part])) for part in _slices(lengths)]
        normalizers = []
        for part, blockwise in ctx.documents:
            if blockwise:
                attend(q[part], k[part], v[part], ctx.scale, out[part])
                continue
            batches = (_as_batch(x[part]) for x in (q, k, v))
            result, normalizer = _forward(*batches, 0.0, True, scale=ctx.scale)
            out[part] = _as_tokens(result)
            normalizers.append(normalizer)
        ctx.save_for_backward(q, k, v, out, *normalizers)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *normalizers = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        remaining = iter(normalizers)
        for part, blockwise in ctx.documents:
            into = dq[part], dk[part], dv[part]
            if blockwise:
                attend_backward(dout[part], q[part], k[part], v[part], ctx.scale, into)
                continue
            batches = (_as_batch(x[part]) for x in (dout, q, k, v, out))
            results = _backward(*batches, next(remaining), 0.0, True, scale=ctx.scale)
            for gradient, result in zip(into, results, strict=True):
                gradient.copy_(_as_tokens(result))
        return dq, dk, dv, None, None


def _slices(lengths: tuple[int, ...]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _as_batch(x: Tensor) -> Tensor:
    """`[T, H, Dh]` -> `[1, H, T, Dh]`, a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _as_tokens(x: Tensor) -> Tensor:
    """`[1, H, T, Dh]` -> `[T, H, Dh]`, a view."""
    return x.squeeze(0).transpose(0, 1)
