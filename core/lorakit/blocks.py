"""What is done to a model's repeated blocks, whatever is in them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from lorakit.protocols import CausalLM


def checkpoint_blocks(model: CausalLM) -> None:
    """Activation checkpointing: each block keeps its input only, and is computed again in the
    backward pass.  Reference: Chen et al. 2016, arXiv 1604.06174."""
    for block in model.blocks:
        inner = block.forward
        block.forward = partial(_checkpointed, block, inner)


def _checkpointed(block: Any, forward: Any, *args: Any) -> Any:
    # Generation keeps no activations, and a cache must not be extended twice.
    if not block.training:
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def compile_blocks(model: CausalLM) -> None:
    """torch.compile block by block: one compilation serves them all, so starting stays short."""
    for block in model.blocks:
        block.compile()
