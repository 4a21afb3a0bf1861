"""Causal attention within documents."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.modules.cache import KeyValueCache
from lorakit.modules.flash import flash_documents, has_flash
from lorakit.modules.kernel_attention import attend_by_kernels, kernels_attending
from lorakit.modules.layout import Layout
from lorakit.modules.low_rank import are_repeatable, fused_now
from lorakit.modules.projections import projections
from lorakit.modules.recompute import can_be_made_again, is_recomputing
from lorakit.modules.rope import Rotary
from lorakit.modules.uncompiled import uncompiled
from lorakit.modules.varlen import has_varlen, varlen_documents

QUERY_BLOCK = 512
"""Queries that share a mask: a document's own would be [T, T]."""
SCORE_ELEMENTS = 16 * 2**20
"""Soft-capped scores in memory at a time: 64 MB of fp32."""


class Attention(nn.Module):
    """o(softmax(q k^T * scale) v), each token seeing its own document up to itself.

    Args:
        dim: D, the hidden width.
        heads: H, the query heads.
        kv_heads: Hkv, the key and value heads; each serves H/Hkv query heads.
        head_dim: Dh.
        rotary: Applied to q and k.
        layer: Index among the attention layers, the key into the cache.
        qkv_bias: Whether q, k and v have a bias.
        out_bias: Whether o has one.
        window: See at most so many tokens, oneself included; None means all.
        scale: Of the scores; None means 1/sqrt(Dh).
        softcap: Scores s become softcap * tanh(s / softcap).
        q_norm: Applied to each query head, before `rotary`.
        k_norm: Likewise to each key head.

    Attributes:
        recompute: Make q, k and v again in the backward pass; part by part, unless the layers that
            give them drop inputs or keep them anyway (DoRA).
        inner: The layers that give q, k and v; a subclass with others says so.
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
        scale: float | None = None,
        softcap: float | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.rotary = rotary
        self.layer = layer
        self.window = window
        self.scale = scale
        self.softcap = softcap
        self._add_projections(dim, qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=out_bias)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.recompute = False

    def _add_projections(self, dim: int, bias: bool) -> None:
        q, k, v = self.widths
        self.q_proj = nn.Linear(dim, q, bias=bias)
        self.k_proj = nn.Linear(dim, k, bias=bias)
        self.v_proj = nn.Linear(dim, v, bias=bias)

    @property
    def inner(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[T, D]` -> q `[T, H * Dh]`, k and v `[T, Hkv * Dh]`."""
        q, k, v = projections(x, *self.inner)
        return q, k, v

    def heads(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """x `[T, D]` -> q `[T, H, Dh]`, k and v `[T, Hkv, Dh]`, q and k rotated."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.project(x))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        # A part of a larger projection would keep all of that in memory until the backward pass.
        return self.rotary.rotate(q, layout), self.rotary.rotate(k, layout), v.contiguous()

    def forward(self, x: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        q, k, v = self.heads(x, layout)
        if self.recompute and is_recomputing() and are_repeatable(self.inner):
            can_be_made_again((q, k, v), partial(self.heads, layout=layout), x)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        out = document_attention(
            q, k, v, layout, window=self.window, scale=self.scale, softcap=self.softcap
        )
        (y,) = projections(out.flatten(-2), self.o_proj)
        return y


class FusedAttention(Attention):
    """`Attention` with one matrix for q, k and v, its rows in that order."""

    def _add_projections(self, dim: int, bias: bool) -> None:
        self.qkv_proj = nn.Linear(dim, sum(self.widths), bias=bias)

    @property
    def inner(self) -> tuple[nn.Module, ...]:
        return (self.qkv_proj,)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[T, D]` -> q `[T, H * Dh]`, k and v `[T, Hkv * Dh]`."""
        (qkv,) = projections(x, *self.inner)
        q, k, v = qkv.split(self.widths, dim=-1)
        return q, k, v


@uncompiled
def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention that never crosses a document's border.

    On CUDA, one call of torch's kernel for documents of any lengths, where that takes them; on a
    CPU, one call of the kernels in use, if there are any.  Else documents are attended one at a
    time: on short ones that is faster than one masked product over all, and needs no [T, T] mask.

    Args:
        q: `[T, H, Dh]`.
        k: `[S, Hkv, Dh]`; S is T, or for a single document more, when a cache holds its start.
        v: Like k.
        layout: The documents; without kernels, tokens that they share are attended once for each.
        window: See at most so many tokens, oneself included.
        scale: Of the scores; None means 1/sqrt(Dh).
        softcap: Scores s become softcap * tanh(s / softcap).

    Returns:
        `[T, H, Dh]`.
    """
    plain = softcap is None and (window is None or max(layout.lengths) <= window)
    if plain and len(q) == len(k) and fused_now():
        kernels = kernels_attending(q, k, v)
        if kernels is not None:
            return attend_by_kernels(kernels, q, k, v, layout, scale)
        if has_flash(q, k):
            return flash_documents(q, k, v, layout.segments, scale)
    if layout.places is not None and layout.owners is not None:
        q, k, v = (x.index_select(0, layout.places) for x in (q, k, v))
        apart = layout.derived("apart", lambda: Layout.of_lengths(layout.lengths, q.device))
        result: Tensor = document_attention(
            q, k, v, apart, window=window, scale=scale, softcap=softcap
        )
        return result.index_select(0, layout.owners)
    if softcap is None and len(q) == len(k) and has_varlen(q):
        return varlen_documents(q, k, v, layout, window=window, scale=scale)
    if len(layout.lengths) == 1:
        return _attend(q, k, v, window, scale, softcap)
    parts = zip(
        q.split(layout.lengths), k.split(layout.lengths), v.split(layout.lengths), strict=True
    )
    return torch.cat([_attend(*part, window, scale, softcap) for part in parts])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """One document: q `[T, H, Dh]`, k and v `[S, Hkv, Dh]`, the last T of S aligned with q."""
    length, seen, heads = q.shape[0], k.shape[0], q.shape[1]
    q = q.transpose(0, 1).unsqueeze(0)
    k, v = _for_query_heads(k, heads), _for_query_heads(v, heads)
    reach = seen if window is None else min(window, seen)
    if softcap is None and reach == seen and length in (1, seen):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, scale=scale)
    else:
        out = _attend_in_blocks(q, k, v, reach, scale, softcap)
    return out.squeeze(0).transpose(0, 1)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, reach: int, scale: float | None, softcap: float | None
) -> Tensor:
    """q `[1, H, T, Dh]`, k and v `[1, H, S, Dh]`: a block of queries at a time, against the keys
    they reach; memory grows with T * reach not at all, with a block's only."""
    length, seen = q.shape[-2], k.shape[-2]
    block = QUERY_BLOCK
    if softcap is not None:
        block = max(1, min(length, SCORE_ELEMENTS // (q.shape[1] * seen)))
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        last = seen - length + stop
        first = max(0, seen - length + start - reach + 1)
        mask = causal_mask(stop - start, last - first, reach, q.device)
        queries, keys, values = q[..., start:stop, :], k[..., first:last, :], v[..., first:last, :]
        if softcap is None:
            part = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
        elif block < length and q.requires_grad:
            # Autograd would keep every block's scores, which is what blocks are to avoid.
            part = checkpoint(
                softcapped_attention, queries, keys, values, mask, scale, softcap,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            part = softcapped_attention(queries, keys, values, mask, scale, softcap)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float
) -> Tensor:
    """softmax(c tanh(q k^T * scale / c)) v, the scores in fp32.

    Args:
        q: `[1, H, T, Dh]`.
        k: `[1, H, S, Dh]`.
        v: Like k.
        mask: `[T, S]`, true where a query sees a key.
        scale: None means 1/sqrt(Dh).
        softcap: c.

    Returns:
        `[1, H, T, Dh]`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-1, -2)).float() * (scale / softcap)
    scores = (scores.tanh() * softcap).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _for_query_heads(x: Tensor, heads: int) -> Tensor:
    """`[S, Hkv, Dh]` -> `[1, H, S, Dh]`, each head repeated for the query heads it serves."""
    groups = heads // x.shape[1]
    x = x.transpose(0, 1)
    if groups > 1:
        x = x.repeat_interleave(groups, dim=0)
    return x.unsqueeze(0)


def causal_mask(length: int, seen: int, window: int, device: torch.device) -> Tensor:
    """`[length, seen]`, true where query (the last `length` positions) sees key: itself and the
    `window` - 1 before it."""
    query = torch.arange(seen - length, seen, device=device).unsqueeze(1)
    key = torch.arange(seen, device=device)
    return (key <= query) & (key > query - window)
