"""Attention by products over blocks of queries is attention."""

from __future__ import annotations

import pytest
import torch

from lorakit.modules import blockwise, flash
from lorakit.modules.layout import apart


def whole(q, k, v, scale):
    """In float64, one document, by the definition."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("block", [2**20, 3 * 40 * 16], ids=["one block", "blocks"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("length", [2, 37, 64])
def test_result_and_gradients_are_those_in_float64(length, heads, kv_heads, block, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(length, n, 8, generator=generator) for n in (heads, kv_heads, kv_heads))
    dout = torch.randn(length, heads, 8, generator=generator)
    out, into = torch.empty_like(q), tuple(torch.empty_like(x) for x in (q, k, v))
    blockwise.attend(q, k, v, 0.3, out)
    blockwise.attend_backward(dout, q, k, v, 0.3, into)

    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = whole(*wide, 0.3)
    gradients = torch.autograd.grad(expected, wide, dout.double())
    for found, true in zip((out, *into), (expected, *gradients), strict=True):
        torch.testing.assert_close(found.double(), true, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_documents_of_both_kinds_in_one_row(monkeypatch):
    """Long ones by blocks, short ones by the kernel, none sees another."""
    monkeypatch.setattr(blockwise, "WORTHWHILE", 2 * 30 * 30 * 8)
    attended = []
    real = blockwise.attend

    def watched(q, *rest):
        attended.append(len(q))
        return real(q, *rest)

    monkeypatch.setattr(flash, "attend", watched)
    lengths = (5, 40, 29, 31)
    inputs = [torch.randn(sum(lengths), n, 8, requires_grad=True) for n in (4, 2, 2)]
    if not flash.has_flash(*inputs[:2]):
        pytest.skip("this torch's kernel has no query heads that share a key head")
    out = flash.flash_documents(*inputs, apart(lengths), None)
    dout = torch.randn(out.shape)
    found = torch.autograd.grad(out, inputs, dout)
    assert attended == [40, 31]

    wide = [x.detach().double().requires_grad_() for x in inputs]
    parts = zip(*(x.split(lengths) for x in wide), strict=True)
    expected = torch.cat([whole(*part, 8**-0.5) for part in parts])
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(expected, wide, dout.double())
    for mine, true in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=1e-5, rtol=1e-5)


def test_the_kernel_stays_where_products_are_not_by_onednn():
    q = torch.randn(2048, 1, 8)
    assert not blockwise.beats_kernel(q, q)
