"""The recipes' models at their real size: built without memory, as transformers builds them.

`configs/` holds the config.json files as published.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import tomli
import torch

from lorakit.catalog import load_catalog
from lorakit.testing.checkpoints import meta_model
from lorakit.weights.base import family_of

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"), key=lambda p: p.stem)
# As the model cards give them: billions of parameters, the tied head counted once.
BILLIONS = {
    "code-llama-7b": 6.74,
    "gemma-2-2b": 2.61,
    "gemma-2b": 2.51,
    "gemma-3-1b-it": 1.00,
    "gemma-3-270m": 0.268,
    "gemma-7b": 8.54,
    "llama-2-13b": 13.02,
    "llama-2-7b": 6.74,
    "llama-3-8b-instruct": 8.03,
    "llama-3.1-8b-instruct": 8.03,
    "llama-3.2-1b-instruct": 1.24,
    "mistral-7b-v0.1": 7.24,
    "mistral-7b-v0.3": 7.25,
    "phi-3-mini-128k-instruct": 3.82,
    "phi-3-mini-4k-instruct": 3.82,
    "phi-4-mini-instruct": 3.84,
    "qwen2.5-7b-instruct": 7.62,
    "qwen3-4b": 4.02,
    "smollm2-135m-instruct": 0.135,
}


def lorakit_model(config):
    return meta_model(family_of(config, load_catalog(), Path("config.json")), config)


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_parameters_are_those_of_transformers(file):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = json.loads(file.read_text(encoding="utf-8"))
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        expected = shapes(AutoModelForCausalLM.from_config(parsed))
    model = lorakit_model(config)
    assert shapes(model) == expected
    # As transformers 5 would write the same file.
    assert shapes(lorakit_model(json.loads(parsed.to_json_string()))) == expected
    count = sum(math.prod(shape) for shape in expected.values())
    assert count / 1e9 == pytest.approx(BILLIONS[file.stem], rel=0.005)


def test_every_recipe_of_a_hub_model_has_its_config_here():
    recipes = tomli.loads((ROOT / "recipes.toml").read_text(encoding="utf-8"))
    paths = {recipe.get("model", {}).get("path", "pypi:") for recipe in recipes.values()}
    names = {p.rpartition("/")[2].lower() for p in paths if not p.startswith("pypi:")}
    renamed = {n.removesuffix("-hf").removeprefix("meta-") for n in names}
    here = {file.stem.replace("code-llama", "codellama") for file in CONFIGS}
    assert sorted(renamed - here) == []
