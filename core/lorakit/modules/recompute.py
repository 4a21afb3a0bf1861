"""What a forward pass need not keep for the backward pass, for it can be made again from what is
kept anyway.

Layers say so themselves, of what they have just made: `can_be_made_again`.  Within a `Recomputing`
block, autograd then keeps how it was made in the place of what was made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from lorakit.modules.norm import RMSNorm


class _Under(threading.local):
    """Of the block that a thread's forward pass is in: what can be made again, by its memory.
    Holding the results keeps their memory from being another tensor's meanwhile."""

    def __init__(self) -> None:
        self.made: dict[int, _Made] | None = None


_under = _Under()


def is_recomputing() -> bool:
    """Whether this thread is in a `Recomputing` block's forward pass."""
    return _under.made is not None


class Recomputing:
    """A block's forward pass in which nothing keeps what a norm gives, nor what layers say can be
    made again.

    Args:
        block: Has the norms.
        forward: Its own forward pass.
    """

    def __init__(self, block: nn.Module, forward: Any) -> None:
        self.block, self.forward = block, forward
        for module in block.modules():
            if isinstance(module, RMSNorm | nn.LayerNorm):
                module.register_forward_hook(note_norm)

    def __call__(self, *args: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.forward(*args)
        _under.made = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
                return self.forward(*args)
        finally:
            _under.made = None


def can_be_made_again(
    results: Sequence[Tensor], make: Callable[[Tensor], Sequence[Tensor]], x: Tensor
) -> None:
    """Says that make(x) gives these results, each time.

    Args:
        results: Have just been made.
        make: Is called during the backward pass, with gradients enabled, on x without its history.
        x: Is kept in their place, or how that was made.
    """
    if _under.made is None:
        return
    again = _Again(make, _pack(x))
    for index, result in enumerate(results):
        _under.made[_memory(result)] = _Made(result.detach(), result._version, (again, index))


class _Again:
    """How results were made, and those that the backward pass has not asked for yet, once it has
    asked for one."""

    def __init__(self, make: Callable[[Tensor], Sequence[Tensor]], source: Any) -> None:
        self.make, self.source = make, source
        self.left: dict[int, Tensor] = {}

    def __getitem__(self, index: int) -> Tensor:
        if index not in self.left:
            x = _unpack(self.source)
            # With gradients, so that layers compute as they did; what that keeps goes at once.
            with torch.enable_grad():
                results = self.make(x.detach())
            self.left = {i: result.detach() for i, result in enumerate(results)}
        return self.left.pop(index)


@frozen(eq=False)
class _Made:
    """A result, which version of it, and how to make that again."""

    result: Tensor
    version: int
    how: tuple[_Again, int]

    def is_all_of(self, tensor: Tensor) -> bool:
        """Whether the tensor is the result, and has not been changed since."""
        return (
            tensor.shape == self.result.shape
            and tensor.stride() == self.result.stride()
            and tensor.storage_offset() == self.result.storage_offset()
            and tensor._version == self.version
        )


def note_norm(norm: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
    """The hook on norms: where their results are computed with gradients, says so of them."""
    if args and torch.is_grad_enabled() and result is not args[0]:
        can_be_made_again([result], lambda x: [norm(x)], args[0])


def _pack(tensor: Tensor) -> Any:
    found = None if _under.made is None else _under.made.get(_memory(tensor))
    if found is None or not found.is_all_of(tensor):
        # Not the tensor itself: what a node gives would then keep that node, and all before it,
        # for good where no backward pass follows.
        return tensor.detach()
    return found.how


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, index = kept
    found: Tensor = again[index]
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
