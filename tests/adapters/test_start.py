"""Training that goes on from a saved adapter, lorakit's or PEFT's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.errors import UserError


def first_loss(run, read_metrics):
    return read_metrics(run)[0]["loss"]


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_a_run_starts_where_another_ended(options, train_run, read_metrics):
    one = {"training": {"batch_size": 12, "max_steps": 1}, "optimizer": {"lr": 2e-2}}
    first = train_run(adapter=options, **one)
    second = train_run(adapter={**options, "path": str(first)}, **one)
    assert first_loss(second, read_metrics) < first_loss(first, read_metrics) - 0.01
    still = train_run(adapter={**options, "path": str(first / "adapter")},
                      training=one["training"], optimizer={"lr": 1e-30})  # fmt: skip
    assert first_loss(still, read_metrics) == first_loss(second, read_metrics)
    before, after = (load_file(run / "adapter" / "adapter_model.safetensors")
                     for run in (first, still))  # fmt: skip
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_it_starts_from_pefts(checkpoint, tmp_path, make_recipe):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "peft")
    recipe = make_recipe(adapter={"path": str(tmp_path / "peft")}, optimizer={"lr": 1e-30})
    run = lorakit.train(recipe).output
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 3}, r"adapter\.rank: .* has 4, the recipe comes to 3"),
        ({"alpha": 5}, r"adapter\.alpha: .* has 8, the recipe comes to 5"),
        ({"dora": True}, r"adapter\.dora: .* has False, the recipe comes to True"),
        ({"rank_pattern": {"q_proj": 2}}, r"adapter\.rank_pattern: .* has {}, the recipe comes"),
        ({"targets": ["q_proj"]}, r"unexpected: .*down_proj"),
        ({"path": "no/such/run"}, r"adapter\.path: no/such/run is no run and no adapter"),
    ],
)
def test_other_settings_are_refused(options, said, train_run, make_recipe):
    first = train_run(training={"max_steps": 1})
    with pytest.raises(UserError, match=said):
        lorakit.train(make_recipe(adapter={"path": str(first), **options}))
