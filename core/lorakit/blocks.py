"""What is done to a model's repeated blocks, whatever is in them."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.modules.norm import RMSNorm
from lorakit.offloading import ActivationOffload
from lorakit.protocols import CausalLM


def checkpoint_blocks(
    model: CausalLM,
    mode: str = "block",
    offload: ActivationOffload | None = None,
    *,
    compiled: bool = False,
) -> None:
    """Activation checkpointing: keeps less for the backward pass, and computes it again there.

    Of a block of a Llama with D = 576, F = 1536, each token keeps 10 D numbers without it, 5 D in
    selective mode, and D in block mode; computed again are 0, half and all of the products.  What
    norms give is computed again in every mode: of a block's time that is less than a hundredth.
    Reference: Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv 2205.05198.

    Args:
        model: Its blocks are changed in place.
        mode: `none`; `block` keeps each block's input; `selective` keeps what the attention
            needs, and computes again what the norms and the feed-forward layer give.  A block
            without a part named `mlp` then keeps its input only.
        offload: In block mode, keeps those inputs on the host; but the last block's, which is
            needed at once.
        compiled: The blocks are; what is kept of their norms is then the compiler's choice.
    """
    last = len(model.blocks) - 1
    for i, block in enumerate(model.blocks):
        if mode == "none":
            if not compiled:
                block.forward = RecomputedNorms(block, block.forward)
        elif mode == "selective" and isinstance(getattr(block, "mlp", None), nn.Module):
            _recompute_selectively(block, norms=not compiled)
        else:
            hooks = offload.hooks if offload and i < last else nullcontext
            block.forward = partial(_checkpointed, block, block.forward, hooks)


def _checkpointed(module: nn.Module, forward: Any, hooks: Any, *args: Any) -> Any:
    # Generation keeps no activations, and a cache must not be extended twice.
    if not module.training:
        return forward(*args)
    with hooks():
        return checkpoint(forward, *args, use_reentrant=False)


def _recompute_selectively(block: Any, *, norms: bool) -> None:
    if hasattr(block.mlp, "recompute"):
        block.mlp.recompute = True
    else:
        block.mlp.forward = partial(_checkpointed, block.mlp, block.mlp.forward, nullcontext)
    if norms:
        block.forward = RecomputedNorms(block, block.forward)


class RecomputedNorms:
    """A block's forward pass in which nothing keeps what a norm gives: the norm is computed again
    from its input, which it keeps itself.

    Args:
        block: Has the norms.
        forward: Its own forward pass.
    """

    def __init__(self, block: nn.Module, forward: Any) -> None:
        self.block, self.forward = block, forward
        self._under_way = _UnderWay()
        for module in block.modules():
            if isinstance(module, RMSNorm | nn.LayerNorm):
                module.register_forward_hook(self._note)

    def __call__(self, *args: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.forward(*args)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                return self.forward(*args)
        finally:
            self._under_way.made.clear()

    def _note(self, norm: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        if torch.is_grad_enabled() and result is not args[0]:
            self._under_way.made[_memory(result)] = (result.detach(), norm, args[0].detach())

    def _pack(self, tensor: Tensor) -> Any:
        made = self._under_way.made.get(_memory(tensor))
        if made is None or made[0].shape != tensor.shape or made[0].stride() != tensor.stride():
            # Not the tensor itself: what a node gives would then keep that node, and all before it,
            # for good where no backward pass follows.
            return tensor.detach()
        return made[1], made[2]


class _UnderWay(threading.local):
    """Of the forward pass that a thread is in: what each norm has given, by its memory, and from
    what.  Holding the results keeps their memory from being another tensor's meanwhile."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Tensor, nn.Module, Tensor]] = {}


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    norm, x = kept
    with torch.no_grad():
        result: Tensor = norm(x)
    return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
