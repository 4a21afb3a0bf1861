"""Attention by torch's kernel for sequences of any lengths: its arguments, by a stand-in for the
kernel that is given the same, and its shapes on a fake device."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit.modules import Layout, attention, varlen
from lorakit.modules.attention import document_attention

LENGTHS = (3, 9, 1, 6)


def stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    """As torch documents it, in plain operations."""
    assert cu_seq_q.dtype == torch.int32
    assert cu_seq_q.tolist() == cu_seq_k.tolist()
    assert max_q == max_k == max(LENGTHS)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    before, after = window_size
    outs = []
    for start, stop in pairwise(cu_seq_q.tolist()):
        q = query[start:stop]
        k, v = (x[start:stop].repeat_interleave(groups, dim=1) for x in (key, value))
        place = torch.arange(len(q))
        distance = place.unsqueeze(1) - place
        seen = distance >= -after
        if before >= 0:
            seen &= distance <= before
        scores = torch.einsum("thd,shd->hts", q, k) * (scale or q.shape[-1] ** -0.5)
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hts,shd->thd", shares, v))
    return torch.cat(outs)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_kernel_is_told_what_the_other_way_computes(kv_heads, window, scale, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(LENGTHS), heads, 8, generator=generator)
        for heads in (4, kv_heads, kv_heads)
    )
    layout = Layout.of_lengths(LENGTHS)
    expected = document_attention(q, k, v, layout, window=window, scale=scale)
    monkeypatch.setattr(varlen, "_kernel", lambda: stand_in)
    monkeypatch.setattr(attention, "has_varlen", lambda q: True)
    found = document_attention(q, k, v, layout, window=window, scale=scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(varlen._kernel() is None, reason="a torch without the kernel")
@pytest.mark.parametrize("window", [None, 4])
def test_shapes(window, monkeypatch):
    """Backward on the meta device: a fake CUDA device's backward pass needs the real one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    layout = Layout.of_lengths(LENGTHS)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = [
            torch.empty(19, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)
        ]
        out = document_attention(*inputs, layout, window=window)
    assert (out.shape, out.device.type) == ((19, 8, 64), "cuda")

    inputs = [
        torch.empty(19, heads, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    ]
    layout = Layout.of_lengths(LENGTHS)
    out = varlen.varlen_documents(*inputs, layout, window=window, scale=None)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability"),
    [(torch.float32, 64, (9, 0)), (torch.bfloat16, 320, (9, 0)), (torch.bfloat16, 64, (7, 5))],
)
def test_what_the_kernel_does_not_take(dtype, head_dim, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q = torch.empty(5, 2, head_dim, device="cuda", dtype=dtype)
        assert not varlen.has_varlen(q)
        assert not varlen.has_varlen(torch.empty(5, 2, 64, dtype=torch.bfloat16))
