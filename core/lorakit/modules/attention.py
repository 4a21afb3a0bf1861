"""Causal attention within documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.modules.cache import KeyValueCache
from lorakit.modules.layout import Layout
from lorakit.modules.rope import Rotary


class Attention(nn.Module):
    """o(softmax(q k^T / sqrt(Dh)) v), each token seeing its own document up to itself.

    Args:
        dim: D, the hidden width.
        heads: Query heads.
        kv_heads: Key and value heads; each serves heads/kv_heads query heads.
        head_dim: Dh.
        rotary: Applied to q and k.
        layer: Index among the attention layers, the key into the cache.
        qkv_bias: Whether q, k and v have a bias.
        out_bias: Whether o has one.
        window: See at most so many tokens, oneself included; None means all.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary: Rotary,
        layer: int,
        qkv_bias: bool = False,
        out_bias: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotary = rotary
        self.layer = layer
        self.window = window
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=out_bias)

    def forward(self, x: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = self.rotary.rotate(q, layout), self.rotary.rotate(k, layout)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        out = document_attention(q, k, v, layout, window=self.window)
        return self.o_proj(out.flatten(-2))


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention that never crosses a document's border.

    Documents are attended one at a time: on short ones that is faster than one masked product
    over all, and needs no [T, T] mask.

    Args:
        q: `[T, H, Dh]`.
        k: `[S, Hkv, Dh]`; S is T, or for a single document more, when a cache holds its start.
        v: Like k.
        layout: The documents.
        window: See at most so many tokens, oneself included.
        scale: Of the scores; None means 1/sqrt(Dh).

    Returns:
        `[T, H, Dh]`.
    """
    if len(layout.lengths) == 1:
        return _attend(q, k, v, window, scale)
    parts = zip(
        q.split(layout.lengths), k.split(layout.lengths), v.split(layout.lengths), strict=True
    )
    return torch.cat([_attend(*part, window, scale) for part in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """One document: q `[T, H, Dh]`, k and v `[S, Hkv, Dh]`, the last T of S aligned with q."""
    length, seen = q.shape[0], k.shape[0]
    groups = q.shape[1] // k.shape[1]
    q = q.transpose(0, 1).unsqueeze(0)
    k, v = _for_query_heads(k, groups), _for_query_heads(v, groups)
    mask = None
    causal = length == seen and length > 1
    if (window is not None and seen > window) or (not causal and length > 1):
        mask, causal = causal_mask(length, seen, window, q.device), False
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return out.squeeze(0).transpose(0, 1)


def _for_query_heads(x: Tensor, groups: int) -> Tensor:
    """`[S, Hkv, Dh]` -> `[1, H, S, Dh]`, each head repeated for the query heads it serves."""
    heads = x.transpose(0, 1)
    if groups > 1:
        heads = heads.repeat_interleave(groups, dim=0)
    return heads.unsqueeze(0)


def causal_mask(length: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """`[length, seen]`, true where query (the last `length` positions) sees key."""
    query = torch.arange(seen - length, seen, device=device).unsqueeze(1)
    key = torch.arange(seen, device=device)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask
