"""Causal attention over several documents, on CUDA, by torch's kernel for sequences of any lengths.

One call for all documents of a micro-batch, windows and shared key heads included.  It takes bf16
and fp16 only.  Not run on a device yet: what is tested are the arguments, by a stand-in for the
kernel, and shapes, on fake tensors.

Reference: torch.nn.attention.varlen, FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.modules.layout import Layout

LARGEST_HEAD = 256
AMPERE = (8, 0)


def has_varlen(q: Tensor) -> bool:
    """Whether the kernel takes queries `[T, H, Dh]` like these."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= LARGEST_HEAD
        and q.shape[-1] % 8 == 0
        and _kernel() is not None
        and torch.cuda.get_device_capability(q.device) >= AMPERE
    )


def varlen_documents(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, window: int | None, scale: float | None
) -> Tensor:
    """o(softmax(scale q k^T) v) within each document, causal.

    Args:
        q: `[T, H, Dh]`.
        k: `[T, Hkv, Dh]`; query head h sees key head h // (H / Hkv).
        v: Like k.
        layout: The documents.
        window: See at most so many tokens, oneself included; None means all.
        scale: None means 1/sqrt(Dh).

    Returns:
        `[T, H, Dh]`.
    """
    starts = layout.derived("starts", lambda: _starts(layout, q.device))
    longest = max(layout.lengths)
    # The kernel counts the tokens before oneself, and -1 is all of them.
    before = -1 if window is None else window - 1
    kernel: Any = _kernel()
    out: Tensor = kernel(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(before, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def _starts(layout: Layout, device: torch.device) -> Tensor:
    """`[N + 1]` where each document starts, and where the last ends; int32."""
    ends = torch.tensor((0, *layout.lengths)).cumsum(0)
    return ends.to(device, torch.int32, non_blocking=True)


def _kernel() -> Any:
    """None in a torch that has it not, or not with windows and shared key heads."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    names = varlen.varlen_attn.__annotations__
    return varlen.varlen_attn if {"window_size", "enable_gqa"} <= names.keys() else None
