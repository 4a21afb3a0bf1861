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
    keys, values = _by_head(k) * scale, _by_head(v)
    for start, stop in _blocks(q, k):
        for head, queries in enumerate(_shared(q[start:stop], k)):
            seen, read = keys[head, :stop], values[head, :stop]
            share = _shares(_rows(queries), seen, start)
            rows = times(share.flatten(0, 1), read)
            _shared(out[start:stop], k)[head].copy_(_queries(rows, stop - start))


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, into: tuple[Tensor, ...]
) -> None:
    """The gradients of q, k and v, given that of `attend`'s result; writes them to `into`.

    With P the softmax's result and S its argument, dV = P^T dO, dP = dO V^T,
    dS = P (dP - rowsum(P dP)), dQ = scale dS K and dK = scale dS^T Q.
    """
    keys, values = _by_head(k) * scale, _by_head(v)
    dq, dk, dv = into
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    for start, stop in _blocks(q, k):
        heads = zip(_shared(q[start:stop], k), _shared(dout[start:stop], k), strict=True)
        for head, (queries, upstream) in enumerate(heads):
            seen, read = keys[head, :stop], values[head, :stop]
            x, dy = _rows(queries), _rows(upstream)
            share = _shares(x, seen, start)
            d_share = times_transposed(dy, read).view_as(share)
            d_values[head, :stop].addmm_(share.flatten(0, 1).t(), dy)
            d_scores = torch._softmax_backward_data(d_share, share, -1, share.dtype).flatten(0, 1)
            d_keys[head, :stop].addmm_(d_scores.t(), x)
            rows = times(d_scores, seen)
            _shared(dq[start:stop], k)[head].copy_(_queries(rows, stop - start))
    dk.copy_(d_keys.transpose(0, 1)).mul_(scale)
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


def _hidden(block: int, like: Tensor) -> Tensor:
    """`[block, block]`, minus infinity above the diagonal, else 0."""
    return like.new_full((block, block), float("-inf")).triu_(1)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, int]]:
    """Where each block of queries starts and stops: of equal size, and few enough scores."""
    length, shared = len(q), q.shape[1] // k.shape[1]
    count = -(-shared * length * length // BLOCK_ELEMENTS)
    rows = -(-length // (count * _ROWS)) * _ROWS
    for start in range(0, length, rows):
        yield start, min(start + rows, length)


def _by_head(x: Tensor) -> Tensor:
    """`[T, Hkv, Dh]` -> `[Hkv, T, Dh]`, each head's rows one after the other in memory."""
    return x.transpose(0, 1).contiguous()


def _shared(x: Tensor, k: Tensor) -> Tensor:
    """`[B, H, Dh]` -> `[Hkv, G, B, Dh]`, a view: by key head, the query heads that see it."""
    return x.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)


def _rows(x: Tensor) -> Tensor:
    """`[G, B, Dh]` -> `[G * B, Dh]`."""
    return x.reshape(-1, x.shape[-1])


def _queries(rows: Tensor, block: int) -> Tensor:
    """`[G * B, Dh]` -> `[G, B, Dh]`, a view."""
    return rows.view(-1, block, rows.shape[-1])
