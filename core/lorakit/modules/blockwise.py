"""Causal attention over one document by plain matrix products, a block of queries at a time.

torch's flash kernel for CPUs makes its products by MKL, in pieces too small to be fast: from
some two hundred tokens on, products of a whole block by oneDNN (see `lorakit.modules.matmul`)
take two thirds of its time.  A block's scores are made again in the backward pass, so memory is
one block's.

Query heads that share a key head are rows of one product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lorakit.modules.frozen import has_memory
from lorakit.modules.matmul import onednn_is_on, times, times_transposed

BLOCK_ELEMENTS = 2**20
"""Scores at a time: 4 MB of fp32, which a core's share of the caches holds."""
WORTHWHILE = 2**22
"""Multiplications of a key head's scores from which on products beat the kernel."""
_ROWS = 16
"""Blocks start at multiples of it."""


def beats_kernel(q: Tensor, k: Tensor) -> bool:
    """Whether the document of these queries `[T, H, Dh]` and keys `[T, Hkv, Dh]` is better attended
    here."""
    length, heads, head_dim = q.shape
    work = heads // k.shape[1] * length * length * head_dim
    return work >= WORTHWHILE and q.dtype == torch.float32 and onednn_is_on()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """out = softmax(scale q k^T) v, each token seeing itself and those before it.

    Args:
        q: `[T, H, Dh]`.
        k: `[T, Hkv, Dh]`; query head h sees key head h // (H / Hkv).
        v: Like k.
        scale: Of the scores.
        out: Like q; is written.
    """
    keys, values = _by_head(k, scale), _by_head(v)
    for start, stop in _blocks(q, k):
        seen, read = keys[:, :stop].unbind(), values[:, :stop].unbind()
        rows = [
            times(_shares(x, seen[head], start).flatten(0, 1), read[head])
            for head, x in enumerate(_shared_rows(q[start:stop], k))
        ]
        _write(out[start:stop], rows)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, into: tuple[Tensor, ...]
) -> None:
    """The gradients of q, k and v, given that of `attend`'s result; writes them to `into`.

    With P the softmax's result and S its argument, dV = P^T dO, dP = dO V^T,
    dS = P (dP - rowsum(P dP)), dQ = scale dS K and dK = scale dS^T Q.
    """
    keys, values = _by_head(k, scale), _by_head(v)
    dq, dk, dv = into
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    for start, stop in _blocks(q, k):
        seen, read = keys[:, :stop].unbind(), values[:, :stop].unbind()
        d_seen, d_read = d_keys[:, :stop].unbind(), d_values[:, :stop].unbind()
        dys = _shared_rows(dout[start:stop], k)
        rows = []
        for head, x in enumerate(_shared_rows(q[start:stop], k)):
            share = _shares(x, seen[head], start)
            d_share = times_transposed(dys[head], read[head]).view_as(share)
            d_read[head].addmm_(share.flatten(0, 1).t(), dys[head])
            d_scores = torch._softmax_backward_data(d_share, share, -1, share.dtype).flatten(0, 1)
            d_seen[head].addmm_(d_scores.t(), x)
            rows.append(times(d_scores, seen[head]))
        _write(dq[start:stop], rows)
    dk.copy_(d_keys.mul_(scale).transpose(0, 1))
    dv.copy_(d_values.transpose(0, 1))


def _shares(x: Tensor, keys: Tensor, start: int) -> Tensor:
    """The softmax of a block of queries from `start` on over the keys up to its end.

    Args:
        x: `[G * B, Dh]`, for each of G heads the B queries.
        keys: `[S, Dh]`, scaled; S = start + B.
        start: Where the block starts.

    Returns:
        `[G, B, S]`.
    """
    seen = len(keys)
    block = seen - start
    scores = times_transposed(x, keys).view(-1, block, seen)
    scores[:, :, start:].add_(_hidden(block, scores))
    return scores.softmax(dim=-1)


_masks: dict[torch.dtype, Tensor] = {}


def _hidden(block: int, like: Tensor) -> Tensor:
    """`[block, block]`, minus infinity above the diagonal, else 0: a part of one that is kept."""
    if not has_memory(like):
        return like.new_empty(block, block)
    kept = _masks.get(like.dtype)
    if kept is None or len(kept) < block:
        with torch.inference_mode(False):
            kept = torch.full((block, block), float("-inf"), dtype=like.dtype).triu_(1)
        _masks[like.dtype] = kept
    return kept[:block, :block]


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, int]]:
    """Where each block of queries starts and stops: of equal size, and few enough scores."""
    length, shared = len(q), q.shape[1] // k.shape[1]
    count = -(-shared * length * length // BLOCK_ELEMENTS)
    rows = -(-length // (count * _ROWS)) * _ROWS
    for start in range(0, length, rows):
        yield start, min(start + rows, length)


def _by_head(x: Tensor, factor: float = 1.0) -> Tensor:
    """`[T, Hkv, Dh]` -> `[Hkv, T, Dh]` times a factor, a copy: each head's rows one after the
    other."""
    length, heads, head_dim = x.shape
    return torch.mul(x.transpose(0, 1), factor, out=x.new_empty(heads, length, head_dim))


def _shared_rows(x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, Dh]` -> for each key head `[G * B, Dh]`: the query heads that see it, one after the
    other."""
    by_head = x.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    return by_head.reshape(k.shape[1], -1, x.shape[2]).unbind()


def _write(out: Tensor, rows: list[Tensor]) -> None:
    """The inverse of `_shared_rows`; out `[B, H, Dh]`."""
    block, _, head_dim = out.shape
    heads = torch.stack(rows).view(len(rows), -1, block, head_dim)
    out.view(block, len(rows), -1, head_dim).copy_(heads.permute(2, 0, 1, 3))
