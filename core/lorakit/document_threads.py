"""The documents of a micro-batch shared out over threads, each of which takes its own through the
whole model.

torch shares out every single operation over its threads, and after each waits for the slowest of
them.  Documents have nothing to do with each other, so a thread that has some for itself waits for
the others once at the end of the forward pass and once at the end of the backward pass; what torch
does not share out, small operations and Python's own work, is shared out too.

Results do not depend on which thread is done first: each part's gradients are summed up by itself,
and the parts' in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.modules.frozen import StoredLinear
from lorakit.modules.matmul import kernels_in_use
from lorakit.modules.narrow import NarrowLinear
from lorakit.options import TrainingOptions
from lorakit.protocols import CausalLM
from lorakit.runtime import is_tuned, set_flush_denormal
from lorakit.scratch import in_slot

I = TypeVar("I")  # noqa: E741
R = TypeVar("R")
MOST_MATERIALIZED = 2**24
"""Numbers in the largest weight that is materialized for each product: each thread has a buffer of
that size, 64 MB of fp32."""

_drawing: WeakSet[nn.Module] = WeakSet()
"""Models that draw random numbers in a forward pass.  In threads, which draws which is chance."""


def document_threads(model: CausalLM, device: torch.device, training: TrainingOptions) -> int:
    """How many threads the documents of a run's micro-batches are shared out over; 1 where they are
    not.

    Args:
        model: With its weights as they are stored, and the adapter.
        device: Threads are for the CPU.
        training: A compiled model is not run by several threads, and a profile is of one.
    """
    if not is_tuned(device) or training.compile or training.profile:
        return 1
    modules = [module for block in model.blocks for module in block.modules()]
    if any(getattr(module, "dropout", 0) for module in modules):
        return 1
    # The head is materialized a block of rows at a time.
    stored = [m for m in modules if isinstance(m, StoredLinear) and not _is_taken_as_stored(m)]
    largest = max((m.in_features * m.out_features for m in stored), default=0)
    return 1 if largest > MOST_MATERIALIZED else torch.get_num_threads()


def _is_taken_as_stored(module: StoredLinear) -> bool:
    """Whether the kernels in use multiply with the weight as it is, however little there is."""
    kernels = kernels_in_use()
    return (
        kernels is not None
        and isinstance(module, NarrowLinear)
        and kernels.multiplies(1, module.weight)
    )


def loss_in_threads(
    part_loss: Callable[[I], Tensor], parts: Sequence[I], model: nn.Module
) -> Tensor | None:
    """The sum of the parts' losses, each computed by a thread of its own, as is its backward pass.

    Args:
        part_loss: Of one part, a scalar; called by another thread.
        parts: Two or more.
        model: Its parameters that require gradients get them.

    Returns:
        None where nothing may be computed in threads, for the model draws random numbers; the
        generator is then as it was.
    """
    if model in _drawing:
        return None
    before = torch.get_rng_state()
    if torch.is_grad_enabled():
        trained = [p for p in model.parameters() if p.requires_grad]
        loss: Tensor = _InThreads.apply(part_loss, parts, *trained)
    else:
        # Each thread has a mode of its own.
        loss = torch.stack(in_threads(torch.no_grad()(part_loss), parts)).sum()
    if not torch.equal(before, torch.get_rng_state()):
        _drawing.add(model)
        torch.set_rng_state(before)
        return None
    return loss


class _InThreads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part_loss: Callable[[I], Tensor], parts: Sequence[I], *trained: Tensor
    ) -> Tensor:
        ctx.losses = in_threads(part_loss, parts)
        ctx.trained = trained
        return torch.stack([loss.detach() for loss in ctx.losses]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        def gradients(loss: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(loss, ctx.trained, upstream, allow_unused=True)

        losses, ctx.losses = ctx.losses, None
        # Activation checkpointing sets the generator, one for all threads, and sets it back.
        before = torch.get_rng_state()
        totals, *others = in_threads(gradients, losses)
        torch.set_rng_state(before)
        for more in others:
            totals = tuple(map(_sum, totals, more))
        return (None, None, *totals)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    # Not in place: two parameters may have one gradient, and its elements may share memory.
    return a + b


def in_threads(function: Callable[[I], R], items: Sequence[I]) -> list[R]:
    """What the function gives for each item, all at the same time; torch's threads are shared out
    over them.  What one raises is raised once all are done."""
    threads = torch.get_num_threads()
    each = max(1, threads // len(items))
    # MKL's number is one for the whole process.
    torch.set_num_threads(each)
    try:
        pool = _pool(len(items), each)
        futures = [pool.submit(_in_slot, i, function, item) for i, item in enumerate(items)]
        _wait(futures)
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(threads)


def _wait(futures: Sequence[Future[R]]) -> None:
    """Until all are done, whatever is raised meanwhile: they write to memory that what comes next
    writes to as well."""
    raised: BaseException | None = None
    while True:
        try:
            wait(futures)
            break
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


def _in_slot(number: int, function: Callable[[I], R], item: I) -> R:
    with in_slot(number):
        return function(item)


@cache
def _pool(count: int, each: int) -> ThreadPoolExecutor:
    def start() -> None:
        torch.set_num_threads(each)
        set_flush_denormal()

    return ThreadPoolExecutor(count, "documents", start)
