"""Attention in blocks of queries against attention over one full mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.modules import Layout, attention, flash
from lorakit.modules.attention import document_attention


def whole(q, k, v, window, softcap, scale=None):
    """By definition, in float64: one document, q the last of k's positions."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("thd,shd->hts", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))
    seen = (key <= query) & (key > query - (window or len(k)))
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return torch.einsum("hts,shd->thd", weights, v)


def heads(generator, length, count, width=8):
    return torch.randn(length, count, width, generator=generator)


@given(
    length=st.integers(1, 40),
    cached=st.integers(0, 30),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.floats(0.5, 10),
    block=st.integers(1, 50),
    scale=st.none() | st.floats(0.1, 2),
)
def test_blocks_change_nothing(length, cached, window, softcap, block, scale):
    generator = torch.Generator().manual_seed(length * 100 + cached)
    q = heads(generator, length, 4)
    k, v = heads(generator, cached + length, 2), heads(generator, cached + length, 2)
    layout = Layout.continued(cached, length)
    before = attention.QUERY_BLOCK, attention.SCORE_ELEMENTS
    attention.QUERY_BLOCK, attention.SCORE_ELEMENTS = block, block * 4 * len(k)
    try:
        found = document_attention(q, k, v, layout, window=window, softcap=softcap, scale=scale)
    finally:
        attention.QUERY_BLOCK, attention.SCORE_ELEMENTS = before
    expected = whole(q, k, v, window, softcap, scale)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
def test_gradients_through_blocks(window, softcap, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", 4 * 4 * 21)
    generator = torch.Generator().manual_seed(0)
    inputs = [heads(generator, 21, count).requires_grad_() for count in (4, 2, 2)]
    out = document_attention(*inputs, Layout.of_lengths([21]), window=window, softcap=softcap)
    weight = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    expected = torch.autograd.grad((whole(*inputs, window, softcap) * weight).sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for found in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(found, torch.Tensor):
                self.elements = max(self.elements, found.numel())
        return out


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_8192_tokens_with_a_window_need_no_square_of_them(softcap, monkeypatch):
    length, window = 8192, 4096
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", 2**22)
    q, k, v = (torch.randn(length, 1, 8) for _ in range(3))
    layout = Layout.of_lengths([length])
    with Largest() as largest:
        out = document_attention(q, k, v, layout, window=window, softcap=softcap)
    assert largest.elements < length * length / 8
    last = whole(q[-3:], k, v, window, softcap)
    torch.testing.assert_close(out[-3:].double(), last, atol=1e-5, rtol=0)


def test_soft_capped_blocks_are_not_kept_for_the_backward_pass(monkeypatch):
    """Autograd would keep every block's scores, all together the square of the length."""
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", 2 * 32 * 256)
    q, k, v = (torch.randn(256, 2, 8, requires_grad=True) for _ in range(3))
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        document_attention(q, k, v, Layout.of_lengths([256]), softcap=5.0)
    assert max(kept) < 256 * 256
    assert sum(kept) < 8 * (q.numel() + k.numel() + v.numel()) + 256 * 256


def test_a_kernel_that_knows_no_shared_heads_is_not_called_for_them(monkeypatch):
    """As torch's before 2.9: it would read beyond the keys, and say nothing."""
    monkeypatch.setattr(flash, "_shares_heads", False)
    monkeypatch.setattr(attention, "flash_documents", lambda *_: pytest.fail("called"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (heads(generator, 9, count).requires_grad_() for count in (4, 2, 2))
    found = document_attention(q, k, v, Layout.of_lengths((9,)))
    torch.testing.assert_close(found, whole(q, k, v, None, None).float())
    assert flash.has_flash(q, q)
