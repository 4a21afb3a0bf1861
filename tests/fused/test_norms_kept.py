"""DoRA's norms are computed once where no parameter changes, and anew where one may have."""

from __future__ import annotations

import torch

from lorakit.blocks import checkpoint_blocks
from lorakit.modules import row_norms
from lorakit.modules.row_norms import norms_kept


def test_once_for_all_micro_batches_and_recomputations(
    make_model, make_batch, loss_and_gradients, monkeypatch
):
    model, batch = make_model("llama", "dora"), make_batch()
    checkpoint_blocks(model, "block")
    loss, expected = loss_and_gradients(model, batch)
    asked, own = [], row_norms.row_norms
    monkeypatch.setattr(
        row_norms, "row_norms", lambda part, weight: asked.append(part.up) or own(part, weight)
    )
    with norms_kept():
        for _ in range(2):
            again, gradients = loss_and_gradients(model, batch)
            assert torch.equal(again, loss)
            assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    adapted = sum("magnitude" in name for name, _ in model.named_parameters())
    assert len(asked) == len({id(up) for up in asked}) == adapted


def test_anew_once_parameters_have_changed(make_model, make_batch, loss_and_gradients):
    model, batch = make_model("llama", "dora"), make_batch()
    with norms_kept():
        before, _ = loss_and_gradients(model, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
    expected, _ = loss_and_gradients(model, batch)
    with norms_kept():
        found, _ = loss_and_gradients(model, batch)
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)
