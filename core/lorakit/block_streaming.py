"""A model that has one block's weights in memory at a time.

For a few passes over little data, by a model that would not fit: each block is read from the
checkpoint when it is called, and let go of when it returns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from attrs import frozen
from torch import nn

from lorakit.modules.narrow import compute_in
from lorakit.progress import SilentProgress
from lorakit.protocols import BaseCheckpoint, CausalLM
from lorakit.weights.part import Part
from lorakit.weights.stream import HEAD, Quantize, stream_weights


def _nothing(module: nn.Module, prefix: str) -> None:
    pass


@frozen
class Loading:
    """What is done to weights as they arrive.

    Attributes:
        device: Where they go.
        dtype: What they are kept in; None keeps each as it is stored.
        compute: What they are computed with.
        quantize: As in `lorakit.weights.stream`.
        adapt: `adapt(module, prefix)` puts the adapter on the part of the model whose names start
            with the prefix.
    """

    device: torch.device
    dtype: torch.dtype | None
    compute: torch.dtype
    quantize: Quantize | None = None
    adapt: Callable[[nn.Module, str], None] = _nothing


def streamed(
    model: nn.Module,
    checkpoint: BaseCheckpoint,
    loading: Loading,
    loaded: Callable[[], object] = lambda: None,
) -> CausalLM:
    """A copy of a model, in evaluation mode, whose blocks are read anew whenever they are called.

    What is outside the blocks (embedding, norm, head) is loaded at once, and stays.

    Args:
        model: On the meta device, without an adapter; stays as it is.
        checkpoint: Its weights.
        loading: What is done to them.
        loaded: Called for each block that has been loaded.
    """
    stored = {name for shard in checkpoint.shards().values() for name in shard}
    copied: Any = copy.deepcopy(model)
    outside = stored
    for name, twin in zip(block_names(model), copied.blocks, strict=True):
        block, prefix = model.get_submodule(name), f"{name}."
        inside = frozenset(name for name in stored if name.startswith(prefix))
        outside = outside - inside
        # As activation checkpointing does: whatever a family's decoder hands to its blocks.
        twin.forward = _Streamed(block, Part(checkpoint, inside, prefix), loading, loaded)
    _load(copied, Part(checkpoint, frozenset(outside)), loading)
    return cast(CausalLM, copied.eval())


def block_names(model: nn.Module) -> list[str]:
    """Dotted names of the blocks, in order."""
    places = {id(module): name for name, module in model.named_modules()}
    return [places[id(block)] for block in cast(CausalLM, model).blocks]


@frozen(eq=False)
class _Streamed:
    """A block's forward pass."""

    block: nn.Module
    part: Part
    loading: Loading
    loaded: Callable[[], object]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        block = _load(copy.deepcopy(self.block), self.part, self.loading)
        self.loaded()
        return block(*args, **keywords)


def _load(module: nn.Module, part: Part, loading: Loading) -> nn.Module:
    stream_weights(
        module,
        part,
        device=loading.device,
        dtype=loading.dtype,
        progress=SilentProgress(),
        quantize=loading.quantize,
        kept_linears=frozenset({HEAD}),
    )
    compute_in(module, loading.compute)
    loading.adapt(module, part.prefix)
    return module.eval()
