"""Each hook with a plugin of its own: what it returns is found, and does its work in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import RecipeError, UserError
from lorakit.recipes import resolve_recipe

Plant = Callable[[str], str]
Recipe = Callable[..., str]
Losses = Callable[[Path], list[float]]


def test_lorakit_model_families(
    plant_sample: Plant, small_recipe: Recipe, base_model: Path, tmp_path: Path, losses: Losses
):
    plant_sample("model_families")
    renamed = tmp_path / "wee-model"
    renamed.mkdir()
    for file in base_model.iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps({**config, "model_type": "wee"}))

    same = lorakit.train(small_recipe(), output=tmp_path / "as-llama")
    result = lorakit.train(small_recipe(model={"name": "wee", "path": str(renamed)}))
    assert losses(result.output) == losses(same.output)
    with pytest.raises(UserError, match="'wee'"):
        lorakit.train(small_recipe(model={"name": "llama", "path": str(renamed)}))


def test_lorakit_adapters(plant_sample: Plant, small_recipe: Recipe, losses: Losses):
    from safetensors.torch import load_file

    from lorakit.mergeable import merge_trained
    from lorakit.trained import load_trained

    plant_sample("adapters")
    adapter = {"name": "scale", "targets": ["v_proj", "down_proj"]}
    run = lorakit.train(small_recipe(adapter=adapter)).output
    assert losses(run)[-1] < losses(run)[0]

    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SCALE"
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 4
    assert "base_model.model.model.layers.0.self_attn.v_proj.scale_rows" in tensors

    merge_trained(str(run), run / "merged")
    adapted, merged = load_trained(str(run)), load_trained(str(run / "merged"))
    assert _logits(adapted.model).allclose(_logits(merged.model), atol=1e-5)


def _logits(model: Any) -> Any:
    import torch

    from lorakit.modules import Layout

    with torch.no_grad():
        return model.logits(model.hidden(torch.arange(12), Layout.of_lengths([12])))


def test_lorakit_quantizations(
    plant_sample: Plant, small_recipe: Recipe, tmp_path: Path, losses: Losses
):
    plant_sample("quantizations")
    plain = lorakit.train(small_recipe(), output=tmp_path / "plain").output
    run = lorakit.train(small_recipe(quantization={"name": "rows8"})).output
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    # The weights are rounded, by less than a percent of each row's largest.
    assert losses(run)[0] != losses(plain)[0]
    assert losses(run)[0] == pytest.approx(losses(plain)[0], rel=0.02)


def test_lorakit_quantizations_leave_the_head_alone(plant_sample: Plant, small_recipe: Recipe):
    from torch import nn

    from lorakit.assemble import assemble
    from lorakit.progress import SilentProgress

    plant_sample("quantizations")
    recipe = resolve_recipe(small_recipe(quantization={"name": "rows8"}))
    model = assemble(recipe, SilentProgress()).base.model
    assert type(model.lm_head) is nn.Linear
    assert not hasattr(model.lm_head, "base")
    wrapped = model.get_submodule("model.layers.1.mlp.down_proj")
    assert type(wrapped.base).__name__ == "Int8Linear"


def test_lorakit_optimizers(plant_sample: Plant, small_recipe: Recipe, losses: Losses):
    plant_sample("optimizers")
    run = lorakit.train(small_recipe(optimizer={"name": "sign", "lr": 1e-2, "decay": 0.2})).output
    assert losses(run)[-1] < losses(run)[0]
    written = (run / "recipe.toml").read_text()
    assert 'name = "sign"' in written
    assert "decay = 0.2" in written


def test_lorakit_precisions(
    plant_sample: Plant, small_recipe: Recipe, capfd: Any, tmp_path: Path, losses: Losses
):
    from safetensors import safe_open

    plant_sample("precisions")
    single = lorakit.train(small_recipe(), output=tmp_path / "single").output
    loggers = [{"name": "disk"}, {"name": "terminal"}]
    run = lorakit.train(small_recipe(precision={"name": "double"}, loggers=loggers)).output
    assert losses(run) == pytest.approx(losses(single), rel=1e-3)
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"F64"}  # noqa: SIM118
    assert "precision: twice the usual" in capfd.readouterr().out
    last = max((run / "checkpoints").iterdir())
    state = json.loads((last / "training_state.json").read_text())
    assert state["precision"] == {"steps": 6}


def test_lorakit_checkpointers(
    plant_sample: Plant, small_recipe: Recipe, tmp_path: Path, losses: Losses
):
    plant_sample("checkpointers")
    whole = lorakit.train(small_recipe(), output=tmp_path / "whole")
    recipe = small_recipe(checkpointer={"name": "memory", "save_merged": False})
    short = lorakit.train(recipe, overrides={"training.max_steps": 3})
    assert short.steps == 3
    assert not (short.output / "checkpoints").exists()
    result = lorakit.train(recipe, resume=True)
    assert result.steps == 6
    assert losses(result.output) == losses(whole.output)


def test_lorakit_loggers(plant_sample: Plant, small_recipe: Recipe, capfd: Any, losses: Losses):
    plant_sample("loggers")
    plant_sample("faulty_loggers")
    loggers = [{"name": "disk"}, {"name": "diary", "file": "d.jsonl"}, {"name": "faulty"}]
    run = lorakit.train(small_recipe(loggers=loggers)).output
    entries = [json.loads(line) for line in (run / "d.jsonl").read_text().splitlines()]
    kinds = [entry[0] for entry in entries]
    assert kinds.count("start") == 1
    assert kinds[-1] == "finish"
    numbers = [entry[1] for entry in entries if entry[0] == "metrics"]
    assert [n["loss"] for n in numbers] == losses(run)
    assert next(e for e in entries if e[0] == "start")[1:3] == ["small", 6]
    # A sink that fails is named once, and the run goes on without it.
    warnings = capfd.readouterr().err
    assert warnings.count("logger 'faulty' failed") == 1
    assert "OSError: out of ink" in warnings


def test_lorakit_datasets(
    plant_sample: Plant, small_recipe: Recipe, tmp_path: Path, losses: Losses
):
    plant_sample("datasets")
    plain = lorakit.train(small_recipe(), output=tmp_path / "plain").output
    quiz = {"name": "quiz", "path": str(tmp_path / "quiz.jsonl")}
    run = lorakit.train(small_recipe(data=quiz)).output
    assert losses(run)[0] != losses(plain)[0]

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "?", "answer": "!"}\n{"question": "?"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2: no key 'answer'"):
        lorakit.train(small_recipe(data={**quiz, "path": str(bad)}), output=tmp_path / "other")


def test_lorakit_weight_formats(
    plant_sample: Plant, small_recipe: Recipe, base_model: Path, tmp_path: Path, losses: Losses
):
    import numpy
    from safetensors.numpy import load_file

    plant_sample("weight_formats")
    other = tmp_path / "other"
    other.mkdir()
    for file in base_model.glob("*.json"):
        (other / file.name).write_bytes(file.read_bytes())
    numpy.savez(other / "weights.npz", **load_file(base_model / "model.safetensors"))

    plain = lorakit.train(small_recipe(), output=tmp_path / "plain").output
    settings = {"model": {"name": "llama", "path": str(other)}}
    settings["checkpointer"] = {"name": "safetensors", "save_merged": True}
    run = lorakit.train(small_recipe(**settings)).output
    assert losses(run) == losses(plain)
    assert (run / "merged" / "model.safetensors").is_file()


def test_lorakit_model_sources(
    plant_sample: Plant,
    small_recipe: Recipe,
    base_model: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    plant_sample("model_sources")
    monkeypatch.setenv("SHELF", str(base_model.parent))
    path = f"shelf:{base_model.name}"
    result = lorakit.train(small_recipe(model={"name": "llama", "path": path}))
    assert result.steps == 6
    with pytest.raises(UserError, match="the shelf has no shelf:nothing"):
        lorakit.train(small_recipe(model={"name": "llama", "path": "shelf:nothing"}))
    # What such paths look like is in the message for a path nobody knows.
    with pytest.raises(RecipeError, match="shelf:NAME"):
        resolve_recipe(small_recipe(model={"name": "llama", "path": "nowhere"}))


BROKEN_KERNELS = """
from lorakit import hookimpl
from lorakit.records import KernelLibrary

def broken():
    raise OSError("no such units")

@hookimpl
def lorakit_kernels():
    made = KernelLibrary(name="a-broken", summary="products", unusable=broken, load=broken)
    return [made]
"""


def test_lorakit_kernels(
    plant_sample: Plant,
    plant: Callable[[str, str], str],
    small_recipe: Recipe,
    tmp_path: Path,
    capfd: Any,
    losses: Losses,
    monkeypatch: pytest.MonkeyPatch,
):
    """The first that can be used here computes products and attention; it can be turned off."""
    plant_sample("kernels")
    plant("lorakit-broken-kernels", BROKEN_KERNELS)
    asked = tmp_path / "asked"
    monkeypatch.setenv("ASKED", str(asked))
    loggers = [{"name": "disk"}, {"name": "terminal"}]
    recipe = small_recipe(loggers=loggers, training={"max_steps": 3})
    plain = lorakit.train(recipe, output=tmp_path / "p", overrides={"training.kernels": "torch"})
    assert "kernels: products in float64" not in capfd.readouterr().out
    assert not asked.exists()

    run = lorakit.train(recipe, output=tmp_path / "wide", overrides={"training.kernels": "a-wide"})
    said = capfd.readouterr().out
    assert "kernels: products in float64" in said
    assert "a-broken" not in said
    assert set(asked.read_text().split()) == {
        *("multiply", "gate", "gate_backward", "attend", "attend_backward"),
        *("adapt", "adapt_backward", "normalize", "normalize_backward", "rotate"),
    }
    assert losses(run.output) == pytest.approx(losses(plain.output), rel=1e-5)

    asked.unlink()
    monkeypatch.setattr("lorakit.assemble.tune_process", lambda *_, **__: None)
    for tuned in ("0", "1"):
        monkeypatch.setenv("LORAKIT_TUNE", tuned)
        lorakit.train(recipe, output=tmp_path / f"tuned-{tuned}")
        assert asked.exists() is (tuned == "1")


def test_lorakit_kernels_that_fail_are_told_of_and_not_used(
    plant: Callable[[str, str], str],
    small_recipe: Recipe,
    capfd: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    plant("lorakit-broken-kernels", BROKEN_KERNELS)
    monkeypatch.setattr("lorakit.assemble.tune_process", lambda *_, **__: None)
    monkeypatch.setenv("LORAKIT_TUNE", "1")
    recipe = small_recipe(loggers=[{"name": "terminal"}], training={"max_steps": 1})
    lorakit.train(recipe, output=tmp_path / "run")
    told = "kernels: a-broken failed and is not used: OSError: no such units"
    assert told in " ".join(capfd.readouterr().out.split())


def test_lorakit_kernels_that_cannot_be_used_are_refused_by_name(
    plant_sample: Plant, plant: Callable[[str, str], str], small_recipe: Recipe
):
    plant_sample("kernels")
    plant("lorakit-broken-kernels", BROKEN_KERNELS)
    for name, reason in (("a-none", "this is today"), ("a-broken", "OSError: no such units")):
        with pytest.raises(UserError, match=f"{name} cannot be used here: {reason}"):
            lorakit.train(small_recipe(), overrides={"training.kernels": name})
    with pytest.raises(RecipeError, match=r"training.kernels: .*'a-wade' \(did you mean 'a-wide'"):
        resolve_recipe(small_recipe(), overrides={"training.kernels": "a-wade"})


def test_lorakit_recipe_problems(plant_sample: Plant, small_recipe: Recipe):
    plant_sample("recipe_problems")
    resolve_recipe(small_recipe())
    wrong = {"optimizer.lr": 0.9, "training.max_grad_norm": 0.0}
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(small_recipe(), overrides=wrong)
    assert caught.value.problems == (
        "training.max_grad_norm: a learning rate above 0.5 needs clipping",
    )


def test_lorakit_recipe_problems_that_raises_is_named(plant_sample: Plant, small_recipe: Recipe):
    plant_sample("recipe_problems")
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(small_recipe(), overrides={"seed": 13})
    (problem,) = caught.value.problems
    assert problem.startswith("lorakit-sample-recipe-problems")
    assert "KeyError('thirteen')" in problem
