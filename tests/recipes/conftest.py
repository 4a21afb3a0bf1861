"""Tiny checkpoints of the shipped recipes' architectures, with tokenizers of their own kinds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
TEXT = (files("lorakit") / "datasets" / "about_lorakit.jsonl").read_text(encoding="utf-8")
GEMMA_TURNS = ["<start_of_turn>", "<end_of_turn>"]
PHI3_TURNS = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"]
LLAMA3_TURNS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHATML_TURNS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def template(name: str) -> str:
    return (files("lorakit") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def sentencepiece_model(directory: Path, turns: list[str], **config: Any) -> None:
    """tokenizer.model, as Llama 2, Mistral, Gemma and Phi-3 have it."""
    import sentencepiece

    text = directory / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=1.0,
        max_sentence_length=10_000,
        user_defined_symbols=turns,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps({**names, **config}))


@pytest.fixture(scope="session")
def make_tiny(
    tmp_path_factory: pytest.TempPathFactory,
    make_tokenizer: Callable[..., Path],
    randomize_weights: Callable[..., None],
) -> Callable[[str], Path]:
    """`make_tiny("mistral-7b-v0.1")`: that model's config.json with small sizes and random
    weights, and a tokenizer of its kind."""
    made: dict[str, Path] = {}

    def tokenizer(directory: Path, model: str) -> None:
        if model.startswith(("llama-3", "phi-4", "qwen")):
            turns = LLAMA3_TURNS if model.startswith("llama-3") else CHATML_TURNS
            chat = template("llama3" if model.startswith("llama-3") else "chatml")
            ends = {"bos_token": turns[0], "eos_token": turns[-1]}
            make_tokenizer(directory, turns, template=chat, **ends)
        elif model.startswith("gemma"):
            chat = {"chat_template": template("gemma")} if model.endswith("-it") else {}
            sentencepiece_model(directory, GEMMA_TURNS, **chat)
        elif model.startswith("phi-3"):
            chat = {"chat_template": template("phi3"), "eos_token": "<|endoftext|>"}
            sentencepiece_model(directory, PHI3_TURNS, **chat)
        else:
            sentencepiece_model(directory, [])

    def make(model: str) -> Path:
        if model in made:
            return made[model]
        import torch
        from safetensors.torch import save_file
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        directory = tmp_path_factory.mktemp(model)
        tokenizer(directory, model)
        config = smaller(json.loads((CONFIGS / f"{model}.json").read_text(encoding="utf-8")))
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        parsed = AutoConfig.for_model(**json.loads(json.dumps(config)))
        reference = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
        randomize_weights(reference, 0)
        # A tied head is one tensor, and safetensors stores it once.
        tensors = {n: p.detach().bfloat16() for n, p in reference.named_parameters()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        made[model] = directory
        return directory

    return make


def smaller(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with few and narrow layers; all else as published."""
    heads = config["num_attention_heads"]
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": max(1, 4 * config.get("num_key_value_heads", heads) // heads),
        "head_dim": 16,
        # One of Gemma 3's six layers sees the whole document.
        "num_hidden_layers": 6 if config["model_type"] == "gemma3_text" else 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    small = {**config, **sizes}
    scaling = small.get("rope_scaling") or {}
    turning = int(16 * config.get("partial_rotary_factor", 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        if key in scaling:
            scaling[key] = scaling[key][:turning]
    if small.get("layer_types"):
        small["layer_types"] = small["layer_types"][: sizes["num_hidden_layers"]]
    return small
