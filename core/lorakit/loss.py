"""Cross-entropy over the trained tokens, without ever holding all their logits.

The head is frozen, so the gradient of the hidden states is all that the backward pass needs of
it.  Each chunk of tokens is projected once, and its gradient is computed there and then: memory
is one chunk of logits instead of [tokens, vocabulary], and nothing is projected twice.

The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.arena import empty_like
from lorakit.data.batches import IGNORED, Batch
from lorakit.document_threads import loss_in_threads
from lorakit.modules.matmul import row_multiple
from lorakit.modules.narrow import NarrowLinear, project, project_back
from lorakit.protocols import CausalLM
from lorakit.scratch import scratch

CHUNK_ELEMENTS = 16 * 2**20
"""Logits in a chunk, at most: 64 MB of fp32."""
CHUNK_TOKENS = 128
"""Tokens in a chunk that products are fast with: more only as long as half as many logits do."""

FP16_GRADIENT_SCALE = 2.0**10
"""Hidden states' gradients times this fit fp16: the largest have the size of a head's row, and
the smallest would vanish below 6e-8 without it."""


def chunk_tokens(vocabulary: int, together: int = 1) -> int:
    """Tokens projected at a time, where so many chunks are in memory together."""
    most = CHUNK_ELEMENTS // together // vocabulary
    return max(1, min(most, max(CHUNK_TOKENS, most // 2)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_i -log softmax(f(W h_i))[y_i], and its gradient in h, chunk by chunk; f(z) is
    cap * tanh(z / cap), or z without a cap.

    With m = max_j f(z)_j, e_j = exp(f(z)_j - m) and s = sum_j e_j, the loss is
    log s - (f(z)_y - m), and its gradient in f(z) is e_j / s, less 1 at y.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, cap: float, chunk: int
    ) -> Tensor:
        """hidden `[N, D]`, weight `[V, D]` in its own dtype, labels `[N]`, cap 0 for none, chunk
        in tokens -> scalar, fp32 at least."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(labels), dtype=wide, device=hidden.device)
        gradient = empty_like(hidden) if ctx.needs_input_grad[0] else hidden.new_empty(0)
        ctx.scale = FP16_GRADIENT_SCALE if hidden.dtype == torch.float16 else 1.0
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            target = labels[part].unsqueeze(1)
            buffers = _Buffers.with_logits(hidden[part], weight, wide, bool(cap))
            loss, total = _softmax_loss_(buffers, target, cap)
            losses[part] = loss
            if ctx.needs_input_grad[0]:
                _slopes_(buffers, target, total, ctx.scale)
                project_back(buffers.product, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        factor = (upstream[0] / ctx.scale).to(gradient.dtype)
        return gradient * factor, None, None, None, None


@frozen
class _Buffers:
    """A chunk's memory, which all chunks share; each `[n, V]`.

    Attributes:
        score: f(z), then what follows from it, in fp32.
        product: What goes in and out of products, in the dtype of the hidden states: the same
            memory as `score` if that is fp32.
        bend: tanh(z / cap), if there is a cap.
    """

    score: Tensor
    product: Tensor
    bend: Tensor | None

    @classmethod
    def with_logits(
        cls, hidden: Tensor, weight: Tensor, wide: torch.dtype, capped: bool
    ) -> _Buffers:
        """z = W h in `product`; hidden `[n, D]`, weight `[V, D]`."""
        shape, own = (len(hidden), len(weight)), hidden.dtype
        dtypes = [wide, *[wide] * capped, *[own] * (own != wide)]
        made = scratch("logits", hidden, *((shape, dtype) for dtype in dtypes))
        product = made[-1] if own != wide else made[0]
        project(hidden, weight, out=product)
        return cls(made[0], product, made[1] if capped else None)


def _softmax_loss_(buffers: _Buffers, target: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Losses `[n]` and s `[n, 1]`, of the z in `product`; leaves e in `score`."""
    score = buffers.score
    if buffers.product is not score:
        score.copy_(buffers.product)
    if buffers.bend is not None:
        torch.tanh(score.div_(cap), out=buffers.bend)
        torch.mul(buffers.bend, cap, out=score)
    score.sub_(score.amax(dim=1, keepdim=True))
    picked = score.gather(1, target)
    total = score.exp_().sum(dim=1, keepdim=True)
    return (total.log() - picked).squeeze(1), total


def _slopes_(buffers: _Buffers, target: Tensor, total: Tensor, scale: float) -> None:
    """The losses' gradient in z, times `scale`, into `product`; takes e in `score`."""
    score = buffers.score
    score.scatter_add_(1, target, -total)
    if buffers.bend is not None:
        # d tanh(u) = 1 - tanh(u)^2.
        score.mul_(buffers.bend.square_().neg_().add_(1))
    # Divided before it is narrowed: a sum over the vocabulary does not fit fp16.
    score.mul_(scale / total)
    if buffers.product is not score:
        buffers.product.copy_(score)


def cross_entropy_sum(
    model: CausalLM,
    hidden: Tensor,
    labels: Tensor,
    places: Tensor | None = None,
    together: int = 1,
) -> Tensor:
    """The negative log-likelihood summed over the trained tokens, fp32.

    Args:
        model: Gives the head, and by `logit_softcap` the cap on its logits.
        hidden: `[T, D]`.
        labels: `[S]`; -100 is not trained, and not even projected.
        places: `[S]` which hidden state is each label's; None where S is T and they are in order.
        together: How many losses are computed at the same time, and share the memory for logits.
    """
    kept = (labels != IGNORED).nonzero().squeeze(1)
    if places is not None:
        hidden, labels = hidden.index_select(0, places[kept]), labels.index_select(0, kept)
    elif len(kept) < len(labels):
        hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    weight = frozen_head_weight(model)
    if weight is None:
        return _recomputed_cross_entropy(model, hidden, labels, together)
    chunk = chunk_tokens(len(weight), together)
    cap = getattr(model, "logit_softcap", None) or 0.0
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, cap, chunk)
    return loss


def frozen_head_weight(model: CausalLM) -> Tensor | None:
    """W `[V, D]`, in the dtype it is stored in, if the logits are W h with a frozen W, soft-capped
    or not, and no more than that; else None."""
    # An adapter or a quantization may have taken the head's place.
    head: nn.Module = model.lm_head
    plain = type(head) in (nn.Linear, NarrowLinear) and head.bias is None
    if not plain or getattr(model, "logits_are_transformed", False):
        return None
    weight = cast(Tensor, head.weight)
    return None if weight.requires_grad else weight


def _recomputed_cross_entropy(
    model: CausalLM, hidden: Tensor, labels: Tensor, together: int
) -> Tensor:
    """For a head with an adapter, or logits that are more than a product: chunk by chunk too,
    logits computed again in the backward pass."""

    def part_loss(part: Tensor, target: Tensor) -> Tensor:
        scores = model.logits(part)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return F.cross_entropy(scores.to(wide), target, reduction="sum")

    chunk = chunk_tokens(int(model.lm_head.out_features), together)
    losses = [
        checkpoint(part_loss, part, target, use_reentrant=False)
        for part, target in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def batch_loss(model: CausalLM, batch: Batch) -> Tensor:
    """The summed loss of a micro-batch; divide by the step's trained tokens."""
    if batch.parts:
        loss = loss_in_threads(partial(batch_loss, model), batch.parts, cast(nn.Module, model))
        if loss is not None:
            return loss
    batch = batch.rounded(row_multiple())
    hidden = model.hidden(batch.tokens, batch.layout)
    return cross_entropy_sum(model, hidden, batch.labels, batch.layout.places, batch.together)
