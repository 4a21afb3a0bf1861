"""Causal attention over several documents, on a CPU, by torch's flash kernel for it.

torch's scaled_dot_product_attention keeps q, k, v and its result for each document, k and v
repeated for the query heads they serve, and joining the documents copies the results.  Called
directly, the kernel repeats nothing, and each document's result goes to its place at once.  Where
it is faster, a long document goes to `lorakit.modules.blockwise` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.arena import empty_like
from lorakit.modules.blockwise import attend, attend_backward, beats_kernel
from lorakit.modules.layout import Segments

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
    q: Tensor, k: Tensor, v: Tensor, documents: Sequence[Segments], scale: float | None
) -> Tensor:
    """o(softmax(scale q k^T) v) within each document, causal.

    Args:
        q: `[T, H, Dh]`.
        k: `[T, Hkv, Dh]`; query head h sees key head h // (H / Hkv).
        v: Like k.
        documents: Where the tokens of each lie: `Layout.segments`.
        scale: None means 1/sqrt(Dh).

    Returns:
        `[T, H, Dh]`.
    """
    out: Tensor = _FlashDocuments.apply(q, k, v, documents, scale)
    return out


class _FlashDocuments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Sequence[Segments],
        scale: float | None,
    ) -> Tensor:
        out = empty_like(q)
        ctx.scale = q.shape[-1] ** -0.5 if scale is None else scale
        ctx.documents = []
        kept = []
        for parts in documents:
            own = parts[-1]
            if own.start == own.stop:
                # Another document is the same.
                continue
            inputs = _joined(q, parts), _joined(k, parts), _joined(v, parts)
            # Decided once: the backward pass of one way cannot follow another's forward pass.
            way = _way_for(*inputs[:2])
            ctx.documents.append((parts, way))
            result = out[own] if len(parts) == 1 else empty_like(inputs[0])
            kept.append(way.forward(inputs, ctx.scale, result))
            if len(parts) > 1:
                out[own] = result[own.start - own.stop :]
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        gradients = [empty_like(x) for x in (q, k, v)]
        for (parts, way), normalizer in zip(ctx.documents, kept, strict=True):
            inputs = _joined(q, parts), _joined(k, parts), _joined(v, parts)
            upstream = _padded(dout[parts[-1]], inputs[0])
            # Of one part, it comes before those that share it: nothing is there to add to.
            alone = len(parts) == 1
            dq, dk, dv = (
                gradient[parts[0]] if alone else empty_like(x)
                for gradient, x in zip(gradients, inputs, strict=True)
            )
            into = dq, dk, dv
            outputs = _joined(out, parts), normalizer
            way.backward(upstream, inputs, outputs, ctx.scale, into)
            if not alone:
                _add_to_parts(gradients, into, parts)
        return (*gradients, None, None)


Inputs = tuple[Tensor, Tensor, Tensor]
"""q `[T, H, Dh]`, k and v `[T, Hkv, Dh]` of one document."""
Outputs = tuple[Tensor, Tensor | None]
"""The result `[T, H, Dh]`, and what else the backward pass needs."""


class _Way(Protocol):
    """How a document is attended."""

    def forward(self, inputs: Inputs, scale: float, out: Tensor) -> Tensor | None:
        """Writes the result to `out` `[T, H, Dh]`, contiguous; what else the backward pass
        needs."""
        ...

    def backward(
        self, dout: Tensor, inputs: Inputs, outputs: Outputs, scale: float, into: Inputs
    ) -> None:
        """Writes the gradients of the inputs to `into`, contiguous."""
        ...


def _way_for(q: Tensor, k: Tensor) -> _Way:
    return _Blockwise() if beats_kernel(q, k) else _Flash()


class _Flash:
    def forward(self, inputs: Inputs, scale: float, out: Tensor) -> Tensor | None:
        batch, normalizer = _forward(*map(_as_batch, inputs), 0.0, True, scale=scale)
        out.copy_(_as_tokens(batch))
        found: Tensor = normalizer
        return found

    def backward(
        self, dout: Tensor, inputs: Inputs, outputs: Outputs, scale: float, into: Inputs
    ) -> None:
        out, normalizer = outputs
        batches = map(_as_batch, (dout, *inputs, out))
        made = _backward(*batches, normalizer, 0.0, True, scale=scale)
        for gradient, found in zip(into, made, strict=True):
            gradient.copy_(_as_tokens(found))


class _Blockwise:
    def forward(self, inputs: Inputs, scale: float, out: Tensor) -> Tensor | None:
        attend(*inputs, scale, out)
        return None

    def backward(
        self, dout: Tensor, inputs: Inputs, outputs: Outputs, scale: float, into: Inputs
    ) -> None:
        attend_backward(dout, *inputs, scale, into)


def _joined(x: Tensor, parts: Segments) -> Tensor:
    """The rows of one document: a view, if they lie together."""
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[part] for part in parts])


def _padded(own: Tensor, like: Tensor) -> Tensor:
    """The gradient of a document's result: zeros before its own tokens, whose results are another
    document's."""
    if len(own) == len(like):
        return own
    padded = torch.zeros_like(like)
    padded[-len(own) :] = own
    return padded


def _add_to_parts(
    gradients: Sequence[Tensor], of_document: Sequence[Tensor], parts: Segments
) -> None:
    """A document's gradients of q, k and v to where its tokens lie.  Tokens of other documents have
    theirs already, for those come before it; of q, theirs are zeros here."""
    for gradient, found in zip(gradients, of_document, strict=True):
        *shared, own = found.split([part.stop - part.start for part in parts])
        gradient[parts[-1]] = own
        if gradient is not gradients[0]:
            for part, more in zip(parts, shared, strict=False):
                gradient[part] += more


def _as_batch(x: Tensor) -> Tensor:
    """`[T, H, Dh]` -> `[1, H, T, Dh]`, a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _as_tokens(x: Tensor) -> Tensor:
    """`[1, H, T, Dh]` -> `[T, H, Dh]`, a view."""
    return x.squeeze(0).transpose(0, 1)
