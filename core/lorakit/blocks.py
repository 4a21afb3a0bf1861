"""What is done to a model's repeated blocks, whatever is in them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from lorakit.offloading import ActivationOffload
from lorakit.protocols import CausalLM


def checkpoint_blocks(model: CausalLM, offload: ActivationOffload | None = None) -> None:
    """Activation checkpointing: each block keeps its input only, and is computed again in the
    backward pass.  Reference: Chen et al. 2016, arXiv 1604.06174.

    Args:
        model: Its blocks are changed in place.
        offload: Keeps those inputs on the host; but the last block's, which is needed at once.
    """
    last = len(model.blocks) - 1
    for i, block in enumerate(model.blocks):
        hooks = offload.hooks if offload and i < last else nullcontext
        block.forward = partial(_checkpointed, block, block.forward, hooks)


def _checkpointed(block: Any, forward: Any, hooks: Any, *args: Any) -> Any:
    # Generation keeps no activations, and a cache must not be extended twice.
    if not block.training:
        return forward(*args)
    with hooks():
        return checkpoint(forward, *args, use_reentrant=False)


def compile_blocks(model: CausalLM) -> None:
    """torch.compile block by block: one compilation serves them all, so starting stays short."""
    for block in model.blocks:
        block.compile()
