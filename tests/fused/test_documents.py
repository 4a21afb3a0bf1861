"""How documents are put together changes neither the loss nor a gradient."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit.data.batches import Batch
from lorakit.modules import Layout, matmul
from lorakit.modules.attention import document_attention
from lorakit.modules.low_rank import plain_path
from lorakit.scratch import fakes_kept

LONGROPE = {
    "original_max_position_embeddings": 10,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.5],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
    },
}
MODELS = {
    "full": ("llama", {}),
    "windowed": ("mistral", {"sliding_window": 5}),
    "windowed_softcapped": ("gemma2", {"sliding_window": 5}),
    "some_windowed": ("gemma3_text", {"sliding_window": 5}),
    "longrope": ("phi3", LONGROPE),
    "longrope_windowed": ("phi3", {**LONGROPE, "sliding_window": 5}),
}


def cut(batch: Batch, documents: int) -> list[Batch]:
    """The same documents in more micro-batches."""
    lengths = batch.layout.lengths
    parts, start = [], 0
    for first in range(0, len(lengths), documents):
        some = lengths[first : first + documents]
        stop = start + sum(some)
        labels = batch.labels[start:stop]
        tokens = batch.tokens[start:stop]
        parts.append(Batch(tokens, labels, Layout.of_lengths(some), int((labels >= 0).sum()), ()))
        start = stop
    return parts


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_packed_or_apart(name, fused, make_model, make_batch, loss_and_gradients):
    model_type, config = MODELS[name]
    model = make_model(model_type, **config)

    def total(batches):
        loss, gradients = 0.0, {}
        for batch in batches:
            part, found = loss_and_gradients(model, batch)
            loss += float(part)
            for key, gradient in found.items():
                gradients[key] = gradients.get(key, 0) + gradient
        return loss, gradients

    def check():
        whole = make_batch()
        # Longer than the window, and on both sides of where LongRoPE switches.
        assert sorted(whole.layout.lengths) == [1, 9, 14]
        loss, gradients = total([whole])
        rounded = whole.rounded(32)
        assert len(rounded.tokens) == 32
        for batches in (cut(whole, 1), cut(whole, 2), [rounded]):
            apart, found = total(batches)
            assert apart == pytest.approx(loss, rel=1e-5)
            for key, expected in gradients.items():
                scale = float(expected.abs().max())
                assert scale > 0, key
                torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-5 * scale, msg=key)

    if fused:
        check()
    else:
        with plain_path():
            check()


@pytest.mark.parametrize("name", MODELS)
def test_the_test_would_see_a_document_run_on(name, make_model, make_batch, loss_and_gradients):
    """The same tokens as one document give another loss."""
    model_type, config = MODELS[name]
    model, batch = make_model(model_type, **config), make_batch()
    apart, _ = loss_and_gradients(model, batch)
    one = Layout.of_lengths([len(batch.tokens)])
    together, _ = loss_and_gradients(
        model, Batch(batch.tokens, batch.labels, one, batch.trained, ())
    )
    assert abs(float(together - apart)) > 1e-3 * float(apart)


@pytest.mark.usefixtures("kernels")
def test_attention_by_kernels_of_tensors_that_lie_otherwise():
    """Heads before tokens in memory, as a family of another package may have them."""
    lengths = (40, 1, 70)
    q, k, v = (torch.randn(heads, sum(lengths), 64).transpose(0, 1) for heads in (4, 2, 2))
    layout, dout = Layout.of_lengths(lengths), torch.randn(sum(lengths), 4, 64)
    found = []
    for in_order in (False, True):
        inputs = [(x.contiguous() if in_order else x).detach().requires_grad_() for x in (q, k, v)]
        out = document_attention(*inputs, layout)
        found.append((out, *torch.autograd.grad(out, inputs, dout)))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)
    with plain_path():
        torch.testing.assert_close(found[0][0], document_attention(q, k, v, layout))


@pytest.mark.usefixtures("kernels")
def test_attention_by_kernels_of_documents_that_share_beginnings():
    """As without sharing, though what shared tokens see is computed once."""
    whole = slice(0, 150)
    segments = [(whole,), (slice(0, 90), slice(150, 200)), (slice(0, 90), slice(200, 200))]
    segments += [(slice(0, 33), slice(200, 263)), (slice(0, 33), slice(200, 210), slice(263, 264))]
    layout = Layout.of_segments(segments)
    q, k, v = (torch.randn(264, heads, 64) for heads in (4, 2, 2))
    dout = torch.randn(264, 4, 64)
    found = []
    for plain in (False, True):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        with plain_path() if plain else nullcontext():
            out = document_attention(*inputs, layout)
        found.append((out, *torch.autograd.grad(out, inputs, dout)))
    assert not torch.equal(found[0][0], found[1][0])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_memory_that_kernels_take_for_attention_is_counted(monkeypatch):
    class Greedy:
        def attends(self, q, k):
            return True

        def attention_bytes(self, q, k):
            return 1000 * len(q)

    monkeypatch.setattr(matmul, "_kernels", [Greedy()])
    with FakeTensorMode(), fakes_kept() as kept:
        x = torch.empty(12, 2, 32, requires_grad=True)
        document_attention(x, x, x, Layout.of_lengths([12]))
    assert [len(memory) for (use, *_), memory in kept.items() if use == "attention"] == [12032]
