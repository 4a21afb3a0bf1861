"""Saving a run reads the adapter and nothing of the base model."""

from __future__ import annotations

import pytest
import torch

from lorakit import assemble, results
from lorakit.progress import TerminalProgress
from lorakit.recipes import resolve_recipe
from lorakit.snapshot import take_snapshot
from lorakit.state import TrainState


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dora", [False, True])
def test_checkpoints_and_adapters_are_written_without_the_base(
    dora, precision, make_recipe, monkeypatch
):
    reference = make_recipe(adapter={"dora": dora}, precision={"name": precision})
    recipe = resolve_recipe(reference)
    run = assemble.assemble(recipe, TerminalProgress())
    parameters = [p for p in run.base.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # On the meta device there is nothing to read: whoever tries, raises.
    for module in run.base.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                meta = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                setattr(module, name, meta)
    with pytest.raises((NotImplementedError, RuntimeError)):
        run.base.model.lm_head.weight.tolist()

    store = recipe.checkpointer.record.open(recipe.output, recipe.checkpointer.options)
    folder = store.save(take_snapshot(run, optimizer, TrainState(step=1)))
    results.write_results(run, TerminalProgress())
    saved = sum(p.numel() * 4 for p in parameters)
    for directory in (folder, recipe.output / "adapter"):
        size = (directory / "adapter_model.safetensors").stat().st_size
        assert saved <= size <= saved + 20_000
    assert store.load(1).adapter.keys()
