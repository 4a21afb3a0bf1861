"""Computing what documents begin with in common once changes neither the loss nor a gradient."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lorakit.data.batches import Batch
from lorakit.modules import Layout, flash
from lorakit.modules.low_rank import plain_path

MODELS = {
    "full": ("llama", {}),
    "windowed": ("mistral", {"sliding_window": 5}),
    "windowed_softcapped": ("gemma2", {"sliding_window": 5}),
    "some_windowed": ("gemma3_text", {"sliding_window": 5}),
    "fused_projections": ("phi3", {}),
    "qwen": ("qwen3", {}),
}
DOCUMENTS = (range(12), [*range(7), 40, 41, 42], [*range(7), 40, 50], [*range(7), 40, 50], [60, 61])
SEGMENTS = (
    (slice(0, 12),),
    (slice(0, 7), slice(12, 15)),
    (slice(0, 7), slice(12, 13), slice(15, 16)),
    (slice(0, 7), slice(12, 13), slice(15, 16), slice(16, 16)),
    (slice(16, 18),),
)


def batches() -> tuple[Batch, Batch]:
    """The documents one after the other, and the same with their beginnings once."""
    whole = torch.cat([torch.tensor(list(document)) for document in DOCUMENTS])
    labels = torch.randint(0, 64, whole.shape, generator=torch.Generator().manual_seed(5))
    # Some of what is shared is trained too, for each document with a label of its own.
    labels[::3] = -100
    trained = int((labels >= 0).sum())
    apart = Batch(whole, labels, Layout.of_lengths([len(d) for d in DOCUMENTS]), trained, ())
    layout = Layout.of_segments(SEGMENTS)
    assert layout.owners is not None
    shared = Batch(whole[layout.owners], labels, layout, trained, ())
    assert (len(whole), len(shared.tokens)) == (42, 18)
    return apart, shared


def check(model, loss_and_gradients):
    apart, shared = batches()
    loss, gradients = loss_and_gradients(model, apart)
    for batch in (shared, shared.rounded(32)):
        found, of_shared = loss_and_gradients(model, batch)
        assert float(found) == pytest.approx(float(loss), rel=1e-5)
        for key, expected in gradients.items():
            scale = float(expected.abs().max())
            assert scale > 0, key
            torch.testing.assert_close(of_shared[key], expected, rtol=0, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_shared_or_apart(name, fused, make_model, loss_and_gradients):
    model_type, config = MODELS[name]
    model = make_model(model_type, **config)
    assert model.shares_prefixes
    with contextlib.nullcontext() if fused else plain_path():
        check(model, loss_and_gradients)


def test_with_products_of_whole_blocks(onednn, monkeypatch, make_model, loss_and_gradients):
    monkeypatch.setattr(flash, "beats_kernel", lambda q, k: True)
    check(make_model("llama"), loss_and_gradients)


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_with_checkpointing(mode, make_model, loss_and_gradients):
    from lorakit.blocks import checkpoint_blocks

    model = make_model("llama")
    checkpoint_blocks(model, mode)
    check(model, loss_and_gradients)


def test_a_wrong_beginning_would_be_seen(make_model, loss_and_gradients):
    """A document that reads another's tokens as its own has another loss."""
    model = make_model("llama")
    apart, shared = batches()
    loss, _ = loss_and_gradients(model, apart)
    wrong = [*SEGMENTS]
    wrong[2] = (slice(1, 8), slice(12, 13), slice(15, 16))
    found, _ = loss_and_gradients(
        model, Batch(shared.tokens, shared.labels, Layout.of_segments(wrong), shared.trained, ())
    )
    assert abs(float(found - loss)) > 1e-3 * float(loss)


def test_not_where_a_state_depends_on_how_long_its_document_is(make_model):
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = make_model("phi3", original_max_position_embeddings=10, rope_scaling=scaling)
    assert not model.shares_prefixes
