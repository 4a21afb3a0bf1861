"""Every shipped recipe trains: its own architecture, tokenizer, template, quantization and
optimizer, with nothing overridden but paths and sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.recipe_files import packed_file
from lorakit.recipes import resolve_recipe
from lorakit.trained import evaluate, load_trained

MODELS = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "codellama/CodeLlama-7b-hf": "code-llama-7b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3-8b-instruct",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b-instruct",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b-instruct",
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "google/gemma-2b": "gemma-2b",
    "google/gemma-7b": "gemma-7b",
    "google/gemma-3-1b-it": "gemma-3-1b-it",
    "microsoft/Phi-3-mini-4k-instruct": "phi-3-mini-4k-instruct",
    "microsoft/Phi-4-mini-instruct": "phi-4-mini-instruct",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b-instruct",
    "Qwen/Qwen3-4B": "qwen3-4b",
}
RECIPES = [name for name in packed_file().names() if name != "quickstart"]
ROW = {"instruction": "Name a plugin.", "input": "", "output": "It is called lorakit-llama."}
ROWS_A_STEP = 16


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The same row over and over, so that both steps see the same."""
    file = tmp_path / "data.jsonl"
    file.write_text((json.dumps(ROW) + "\n") * 2 * ROWS_A_STEP, encoding="utf-8")
    return file


def losses(run: Path, data: Path) -> tuple[float, float]:
    """fp32 loss without and with what the run's adapter learned."""
    trained = load_trained(str(run), "cpu")
    after = evaluate(trained, str(data), "alpaca").loss
    for parameter_name, parameter in trained.model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.zero_()
    return evaluate(trained, str(data), "alpaca").loss, after


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_lower_the_loss(
    name: str,
    make_tiny: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    path = resolve_recipe(name).model.options.path
    overrides = {
        "device": "cpu",
        "model.path": str(make_tiny(MODELS[path])),
        "data.path": str(data),
        "data.max_seq_len": 256,
        "training.batch_size": ROWS_A_STEP // 8,
        "training.gradient_accumulation_steps": 8,
        "training.max_steps": 2,
    }
    result = lorakit.train(name, overrides=overrides, output=str(tmp_path / "run"))
    first, second = (step["loss"] for step in read_metrics(result.output))
    # A step of 2e-5 is less than what bf16 rounds away of the loss, so that is all that can be
    # asked of the run's own numbers; in fp32 the fall is there.
    assert second < first + 0.01
    before, after = losses(result.output, data)
    assert after < before - 1e-5
    assert (result.output / "adapter" / "adapter_model.safetensors").is_file()
    assert (result.output / "merged" / "model.safetensors").is_file()


def test_every_recipe_names_a_model_that_is_tested() -> None:
    assert {resolve_recipe(name).model.options.path for name in RECIPES} == set(MODELS)
