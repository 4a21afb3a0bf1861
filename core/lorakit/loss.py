"""Cross-entropy over the trained tokens, without ever holding all their logits.

The head is frozen, so the gradient of the hidden states is all that the backward pass needs of
it.  Each chunk of tokens is projected once, and its gradient is computed there and then: memory
is one chunk of logits instead of [tokens, vocabulary], and nothing is projected twice.

The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.data.batches import IGNORED, Batch
from lorakit.protocols import CausalLM

CHUNK_ELEMENTS = 16 * 2**20
"""Logits in a chunk: 64 MB of fp32.  Larger chunks are no faster, on CPU they are slower."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_i -log softmax(W h_i)[y_i], and its gradient in h, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        """hidden `[N, D]`, weight `[V, D]`, labels `[N]` -> scalar, fp32."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else hidden.new_empty(0)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).float()
            target = labels[part].unsqueeze(1)
            log_normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += (log_normalizer - logits.gather(1, target)).sum()
            if not wanted:
                continue
            # d/dlogits = softmax - onehot, in place of the logits.
            probabilities = logits.sub_(log_normalizer).exp_()
            probabilities.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=logits.dtype))
            torch.matmul(probabilities.to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None


def cross_entropy_sum(model: CausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood summed over the trained tokens, fp32.

    Args:
        model: Gives the head.
        hidden: `[T, D]`.
        labels: `[T]`; -100 is not trained, and not even projected.
    """
    kept = (labels != IGNORED).nonzero().squeeze(1)
    hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    chunk = max(1, CHUNK_ELEMENTS // int(model.lm_head.out_features))
    if has_plain_frozen_head(model):
        weight = model.lm_head.weight
        loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)
        return loss
    return _recomputed_cross_entropy(model, hidden, labels, chunk)


def has_plain_frozen_head(model: CausalLM) -> bool:
    """Whether logits are W h with a frozen W, and no more than that."""
    # An adapter or a quantization may have taken the head's place.
    head: nn.Module = model.lm_head
    if type(head) is not nn.Linear or getattr(model, "logits_are_transformed", False):
        return False
    return cast("Tensor | None", head.bias) is None and not head.weight.requires_grad


def _recomputed_cross_entropy(
    model: CausalLM, hidden: Tensor, labels: Tensor, chunk: int
) -> Tensor:
    """For a head with an adapter or a soft-cap: chunk by chunk too, logits computed again in the
    backward pass."""

    def part_loss(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(part).float(), target, reduction="sum")

    losses = [
        checkpoint(part_loss, part, target, use_reentrant=False)
        for part, target in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def batch_loss(model: CausalLM, batch: Batch) -> Tensor:
    """The summed loss of a micro-batch; divide by the step's trained tokens."""
    hidden = model.hidden(batch.tokens, batch.layout)
    return cross_entropy_sum(model, hidden, batch.labels)
