"""What is done to a model's repeated blocks, whatever is in them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lorakit.errors import UserError
from lorakit.modules.recompute import Recomputing
from lorakit.offloading import ActivationOffload
from lorakit.options import faster_mode
from lorakit.protocols import CausalLM


def checkpoint_blocks(
    model: CausalLM,
    mode: str = "block",
    offload: ActivationOffload | None = None,
    *,
    count: int = 0,
    compiled: bool = False,
) -> None:
    """Activation checkpointing: keeps less for the backward pass, and computes it again there.

    Of a block of a Llama with D = 576, F = 1536, each token keeps 10 D numbers without it, 3 D in
    selective mode, and D in block mode; computed again are 0, two thirds and all of the products,
    and only in block mode the attention.  What norms give is computed again in every mode: of a
    block's time that is less than a hundredth.
    Reference: Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv 2205.05198.

    Args:
        model: Its blocks are changed in place.
        mode: `none`; `block` keeps each block's input; `selective` keeps its input, what the
            attention gives and the input of the feed-forward layer, and computes again what comes
            between.  A block without a part named `mlp` then keeps its input only.
        offload: In block mode, keeps those inputs on the host; but the last block's, which is
            needed at once.
        count: Of how many blocks, the first ones, the mode is; 0 for all.  Others are in the next
            faster one.  What the last blocks keep is the first to go.
        compiled: The blocks are; what is kept of their norms is then the compiler's choice, and
            `selective` makes again what the feed-forward layer gives only.

    Raises:
        UserError: The model has fewer blocks.
    """
    check_block_count(model, count)
    blocks = model.blocks
    modes = [mode] * (count or len(blocks))
    modes += [faster_mode(mode)] * (len(blocks) - len(modes))
    for block, own in zip(blocks, modes, strict=True):
        if own == "none":
            if not compiled:
                block.forward = Recomputing(block, block.forward)
        elif own == "selective" and isinstance(getattr(block, "mlp", None), nn.Module):
            _recompute_selectively(block, norms=not compiled)
        else:
            hooks = offload.hooks if offload and block is not blocks[-1] else nullcontext
            block.forward = partial(_checkpointed, block, block.forward, hooks)


def check_block_count(model: CausalLM, count: int) -> None:
    """Before anything is loaded for a model that has fewer blocks than are to be checkpointed.

    Raises:
        UserError: It has.
    """
    if count > len(model.blocks):
        problem = f"training.checkpointed_blocks: {count}, where the model has {len(model.blocks)}"
        raise UserError(problem, "Leave it out for all.")


def _checkpointed(module: nn.Module, forward: Any, hooks: Any, *args: Any) -> Any:
    # Generation keeps no activations, and a cache must not be extended twice.
    if not module.training:
        return forward(*args)
    with hooks():
        return checkpoint(forward, *args, use_reentrant=False)


def _recompute_selectively(block: Any, *, norms: bool) -> None:
    if not isinstance(getattr(block.mlp, "recompute", None), bool):
        block.mlp.forward = partial(_checkpointed, block.mlp, block.mlp.forward, nullcontext)
    else:
        block.mlp.recompute = True
    if norms:
        for part in block.children():
            if isinstance(getattr(part, "recompute", None), bool):
                part.recompute = True
        block.forward = Recomputing(block, block.forward)
