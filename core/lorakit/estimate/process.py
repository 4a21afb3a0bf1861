"""What a process takes before a run has put anything into it."""

from __future__ import annotations

import gc
from functools import cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorakit.estimate.room import resident_bytes
from lorakit.modules.matmul import times, times_transposed

SHAPES_OF_PRODUCTS = 32
"""About as many as a model's layers, their adapters and some lengths of rows come to."""


@cache
def settle() -> int:
    """Does on a small scale what a step does, so that libraries which load on first use, and the
    threads' buffers, count among what the process has.

    Returns:
        The bytes this came to: a run has them from its first step on, not while it loads.
    """
    before = resident_bytes()
    layer = nn.Linear(512, 512)
    optimizer = torch.optim.AdamW(layer.parameters())
    states = torch.randn(256, 512, requires_grad=True)
    checkpoint(layer, states, use_reentrant=False).sum().backward()
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    # oneDNN, where it is used, keeps code for each shape of a product: half a megabyte.
    for rows in range(SHAPES_OF_PRODUCTS):
        x = torch.randn(64 + rows, 512)
        times(times_transposed(x, layer.weight.detach()), layer.weight.detach())
    gc.collect()
    return max(0, resident_bytes() - before)
