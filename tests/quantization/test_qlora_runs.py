"""Whole runs over quantized base weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit.assemble import assemble, describe
from lorakit.builtin.loggers import DiskLogger
from lorakit.errors import Interrupted, RecipeError, UserError
from lorakit.modules import StoredLinear
from lorakit.progress import SilentProgress
from lorakit.recipes import resolve_recipe
from lorakit.trained import evaluate, load_trained
from lorakit_bitsandbytes.nf4 import NF4Linear

# Wide enough for whole blocks, and for adapters whose state is kept in 8 bits.
WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
SECTIONS = {
    "adapter": {"rank": 24, "dropout": 0.1},
    "training": {"batch_size": 3, "epochs": 2},
    "quantization": {"name": "nf4"},
}
STABLE = ("step", "loss", "lr", "grad_norm")


@pytest.fixture
def recipe(make_recipe, make_checkpoint):
    def recipe(model: Path | None = None, **sections) -> str:
        return make_recipe(model=model or make_checkpoint(**WIDE), **{**SECTIONS, **sections})

    return recipe


def run_of(reference: str) -> Path:
    return Path(reference.rpartition(":")[0]).parent / "run"


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_run_trains_over_a_quantized_base(scheme, dora, recipe, read_metrics):
    reference = recipe(
        quantization={"name": scheme},
        adapter={**SECTIONS["adapter"], "dora": dora},
        training={"batch_size": 3, "epochs": 5},
    )
    metrics = read_metrics(lorakit.train(reference).output)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]


def test_every_linear_layer_but_the_head_is_quantized(recipe):
    run = assemble(resolve_recipe(recipe()), SilentProgress())
    kinds = {n: type(m.base) for n, m in run.base.model.named_modules() if hasattr(m, "base")}
    assert len(kinds) == 2 * 7
    assert all(issubclass(kind, StoredLinear) for kind in kinds.values())
    assert type(run.base.causal_lm.lm_head) is torch.nn.Linear


def test_parameters_are_counted_as_if_nothing_were_quantized(recipe, make_recipe, make_checkpoint):
    quantized = assemble(resolve_recipe(recipe()), SilentProgress())
    sections = {k: v for k, v in SECTIONS.items() if k != "quantization"}
    plain = make_recipe(model=make_checkpoint(**WIDE), **sections)
    assert quantized.parameters == assemble(resolve_recipe(plain), SilentProgress()).parameters


def test_activation_checkpointing_changes_no_number(recipe, read_metrics):
    plain = lorakit.train(recipe(adapter={"rank": 24}))
    training = {**SECTIONS["training"], "activation_checkpointing": True}
    again = lorakit.train(recipe(adapter={"rank": 24}, training=training))
    for ours, theirs in zip(read_metrics(again.output), read_metrics(plain.output), strict=True):
        assert {k: ours[k] for k in STABLE} == pytest.approx({k: theirs[k] for k in STABLE})


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw", "paged_lion8bit"])
def test_interrupted_run_resumes_to_the_same_adapter(
    name, recipe, tmp_path, monkeypatch, read_metrics
):
    reference = recipe(optimizer={"name": name, "lr": 1e-3})
    whole = lorakit.train(reference, output=tmp_path / "whole")
    log = DiskLogger.metrics

    def metrics(self, values):
        log(self, values)
        if values["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(DiskLogger, "metrics", metrics)
    with pytest.raises(Interrupted):
        lorakit.train(reference)
    monkeypatch.undo()
    saved = load_file(run_of(reference) / "checkpoints/step-00000003/training_state.safetensors")
    eight = [k for k, t in saved.items() if t.dtype == torch.uint8 and "state1" in k]
    assert bool(eight) is ("8bit" in name)
    resumed = lorakit.train(reference, resume=True)
    assert resumed.loss == whole.loss
    for file in (
        "adapter/adapter_model.safetensors",
        f"checkpoints/step-{whole.steps:08d}/training_state.safetensors",
    ):
        assert (resumed.output / file).read_bytes() == (whole.output / file).read_bytes()
    ours, theirs = read_metrics(resumed.output), read_metrics(whole.output)
    assert [[m[k] for k in STABLE] for m in ours] == [[m[k] for k in STABLE] for m in theirs]


def test_a_paged_optimizer_says_once_that_it_does_not_page_here(recipe):
    sections = recipe(optimizer={"name": "paged_adamw8bit", "lr": 1e-3})
    command = [sys.executable, "-m", "lorakit", "train", sections]
    command += ["--set", 'loggers=[{name="terminal"}]']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("no pages on cpu") == 1
    assert "Paged optimizers are not supported" not in said
    assert "kernels" not in said


def test_the_notice_is_among_those_of_a_dry_run(recipe):
    resolved = resolve_recipe(recipe(optimizer={"name": "paged_adamw", "lr": 1e-3}))
    lines = describe(assemble(resolved, SilentProgress(), weights=False))
    assert sum("no pages on cpu" in line for line in lines) == 1


# ---------------------------------------------------------------- what a run left behind


def kinds_of(model: torch.nn.Module) -> set[type]:
    return {type(m.base) for m in model.modules() if hasattr(m, "base")}


@pytest.mark.parametrize("options", [{}, {"double_quant": False, "block_size": 32}])
def test_a_run_its_adapter_and_its_checkpoint_load_quantized_as_trained(options, recipe):
    quantization = {"name": "nf4", **options}
    output = lorakit.train(recipe(quantization=quantization)).output
    checkpoint = max((output / "checkpoints").iterdir())
    for path in (output, output / "adapter", checkpoint):
        model = load_trained(str(path), "cpu").model
        layers = [m.base for m in model.modules() if hasattr(m, "base")]
        assert {type(layer) for layer in layers} == {NF4Linear}
        assert {layer.block_size for layer in layers} == {options.get("block_size", 64)}
        assert {layer.double_quant for layer in layers} == {options.get("double_quant", True)}
        plain = load_trained(str(path), "cpu", full_precision=True).model
        assert kinds_of(plain) == {torch.nn.Linear}


def test_evaluation_gives_the_loss_that_training_saw(recipe, make_rows, read_metrics):
    """Evaluated over its own data, a run of one step at next to no learning rate has its loss."""
    settings = {"epochs": 1, "batch_size": 12}
    reference = recipe(training=settings, adapter={"rank": 4}, optimizer={"lr": 1e-12})
    output = lorakit.train(reference).output
    (step,) = read_metrics(output)
    data = str(output.parent / "data.jsonl")
    loaded = evaluate(load_trained(str(output), "cpu"), data, "messages").loss
    plain = load_trained(str(output), "cpu", full_precision=True)
    assert loaded == pytest.approx(step["loss"], abs=1e-5)
    assert evaluate(plain, data, "messages").loss != pytest.approx(step["loss"], abs=1e-4)


def test_a_scheme_that_is_no_longer_installed_is_told(recipe):
    output = lorakit.train(recipe()).output
    own = output / "adapter" / "lorakit.json"
    own.write_text(own.read_text().replace('"nf4"', '"nf3"'))
    with pytest.raises(UserError, match="no quantization is called 'nf3'"):
        load_trained(str(output), "cpu")
    assert load_trained(str(output), "cpu", full_precision=True)
    own.write_text(own.read_text().replace('"nf3"', '"nf4"').replace("64", "63"))
    with pytest.raises(UserError, match=r"quantization\.block_size"):
        load_trained(str(output), "cpu")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("size", [63, 0, 8192, "64"])
def test_a_block_size_that_bitsandbytes_lacks_is_refused(size, recipe):
    with pytest.raises(RecipeError, match=r"quantization\.block_size: .*32.*4096|expected"):
        resolve_recipe(recipe(quantization={"name": "nf4", "block_size": size}))


def test_bitsandbytes_not_installed_is_one_problem_of_the_recipe(recipe, monkeypatch):
    from lorakit_bitsandbytes import library

    monkeypatch.setattr(library, "NAME", "bitsandbytes_is_not_here")
    reference = recipe(optimizer={"name": "adamw8bit", "lr": 1e-3})
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(reference)
    keys = [p.split(":")[0] for p in caught.value.problems]
    assert keys == ["quantization.name", "optimizer.name"]
    assert all("pip install" in p for p in caught.value.problems)
    plain = recipe(quantization={"name": "nf4"}, optimizer={"name": "adamw", "lr": 1e-3})
    with pytest.raises(RecipeError, match="1 problem"):
        resolve_recipe(plain)


def test_a_bitsandbytes_that_fails_to_import_is_one_clear_message(recipe, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "bitsandbytes.py").write_text("raise RuntimeError('libcudart.so.12: not found')\n")
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "train", recipe()],
        env={**os.environ, "PYTHONPATH": str(broken)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "bitsandbytes cannot be imported: RuntimeError('libcudart.so.12: not found')" in (
        " ".join(done.stderr.split())
    )


def test_a_model_with_nothing_to_quantize_is_refused(recipe, monkeypatch):
    from lorakit import base_model

    monkeypatch.setattr(base_model, "linear_names", lambda model: ["lm_head"])
    with pytest.raises(UserError, match="has no linear layer but its head"):
        lorakit.train(recipe())


def test_the_weight_that_cannot_be_held_is_named(recipe, make_checkpoint, tmp_path):
    from safetensors.torch import save_file

    source, model = make_checkpoint(**WIDE), tmp_path / "model"
    model.mkdir()
    for file in source.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*not finite"):
        lorakit.train(recipe(model))


def test_the_plugin_imports_neither_torch_nor_bitsandbytes():
    script = (
        "import sys, json, lorakit_bitsandbytes as p;"
        "p.lorakit_quantizations(); p.lorakit_optimizers();"
        "print(json.dumps([m for m in ('torch', 'bitsandbytes', 'numpy') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) == []
