"""Adapters of every model family, to PEFT and back, and merged: the same logits each time."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.adapters import adapter_config, adapter_tensors, apply_adapter, write_adapter
from lorakit.base_model import load_weights, open_base_model
from lorakit.catalog import first_party, load_catalog
from lorakit.errors import UserError
from lorakit.mergeable import merge_trained
from lorakit.progress import SilentProgress
from lorakit.trained import load_trained

CATALOG = load_catalog()
LORA = CATALOG.get("adapter", "lora")
CPU = torch.device("cpu")
IDS = [5, 300, 17, 17, 201, 9, 383, 0, 44, 120, 77, 256, 3, 91, 12, 260, 33, 34, 35, 111]
SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
RANKS = {r"model\.layers\.1\.mlp\..*": 2, "o_proj": 6}
# What a recipe writes, and what PEFT calls it.
VARIANTS = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "rank_pattern": (
        {"rank_pattern": RANKS, "alpha_pattern": {"down_proj": 3.0}, "dropout": 0.25},
        {"rank_pattern": RANKS, "alpha_pattern": {"down_proj": 3}, "lora_dropout": 0.25},
    ),
    "rank_pattern_dora_rslora": (
        {"rank_pattern": RANKS, "dora": True, "rslora": True},
        {"rank_pattern": RANKS, "use_dora": True, "use_rslora": True},
    ),
}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory, tokenizer_dir):
    """`base_of(model_type, tied)` -> a random checkpoint as transformers writes it."""
    made = {}

    def base_of(model_type, tied=True):
        if (model_type, tied) not in made:
            settings = {**SMALL, **MODELS[model_type], "tie_word_embeddings": tied}
            config = AutoConfig.for_model(model_type, **settings)
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(config)
            randomize(model)
            directory = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(directory)
            for file in tokenizer_dir.iterdir():
                shutil.copy(file, directory)
            made[model_type, tied] = directory
        return made[model_type, tied]

    return base_of


def randomize(model, step=1.0):
    """Weights of the size trained ones have; PEFT's magnitudes move from where they start."""
    for name, parameter in model.named_parameters():
        noise = step * torch.randn_like(parameter)
        with torch.no_grad():
            if "norm" in name:
                parameter.add_(0.2 * noise)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * noise * (parameter.abs() if "magnitude" in name else 1))
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)


def hugging_face(path):
    # Older releases take SDPA, which knows no soft-cap.
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


@torch.no_grad()
def logits(model):
    return model(torch.tensor([IDS])).logits[0]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def save_with_lorakit(base, directory, **options):
    """lorakit's model with a random adapter on, which is written."""
    opened = open_base_model(str(base), CATALOG, SilentProgress())
    fp32 = CATALOG.get("precision", "fp32")
    precision = fp32.resolve(CPU, fp32.options())
    load_weights(opened, device=CPU, precision=precision, progress=SilentProgress())
    chosen = LORA.options(**{"rank": 4, "alpha": 6.0, **options})
    names = apply_adapter(opened.model, LORA, chosen, torch.float32)
    for name in names:
        adapter = opened.model.get_submodule(name)
        randomize(nn.ParameterDict({n.replace(".", "/"): p for n, p in adapter.named_parameters()
                                    if n.startswith("lora_")}))  # fmt: skip
    config = adapter_config(LORA, chosen, names, str(base))
    tensors = adapter_tensors(opened.model, names)
    write_adapter(directory, tensors, config, files=opened.tokenizer.files, origin={})
    return opened.model.eval()


def load_with_peft(base, directory):
    """Fails on a key that is missing, unexpected, or of another shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        model = PeftModel.from_pretrained(hugging_face(base), directory).eval()
    result = model.load_adapter(directory, adapter_name="again")
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if ".again" in key] == []
    loaded = {k for k, _ in model.named_parameters() if ".default" in k}
    assert len(loaded) == len(load_file(directory / "adapter_model.safetensors"))
    return model


def save_with_peft(base, directory, **settings):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear",
                           "task_type": "CAUSAL_LM", **settings})  # fmt: skip
    model = get_peft_model(hugging_face(base), config).eval()
    randomize(nn.ParameterDict({n.replace(".", "/"): p for n, p in model.named_parameters()
                                if "lora_" in n}))  # fmt: skip
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_go_both_ways_and_merge(model, variant, base_of, tmp_path, logits_of):
    base = base_of(model)
    plain = logits(hugging_face(base))
    options, settings = VARIANTS[variant]

    own = logits_of(save_with_lorakit(base, tmp_path / "own", **options), IDS)
    assert (own - plain).abs().max() > 0.05
    assert_close(logits(load_with_peft(base, tmp_path / "own")), own)
    assert_close(logits_of(load_trained(str(tmp_path / "own"), "cpu").model, IDS), own)

    pefts = logits(save_with_peft(base, tmp_path / "peft", **settings))
    assert (pefts - plain).abs().max() > 0.05
    assert_close(logits_of(load_trained(str(tmp_path / "peft"), "cpu").model, IDS), pefts)

    merge_trained(str(tmp_path / "peft"), tmp_path / "merged")
    merged = hugging_face(tmp_path / "merged")
    assert_close(logits(merged), pefts)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    kept = {k: v.shape for k, v in load_file(base / "model.safetensors").items()}
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {k: v.shape for k, v in found.items()} == kept


@pytest.mark.parametrize("model", ["llama", "phi3", "qwen3"])
def test_head_of_its_own(model, base_of, tmp_path, logits_of):
    base = base_of(model, tied=False)
    targets = ["o_proj", "lm_head"]
    own = logits_of(save_with_lorakit(base, tmp_path / "own", targets=tuple(targets)), IDS)
    assert_close(logits(load_with_peft(base, tmp_path / "own")), own)
    pefts = logits(save_with_peft(base, tmp_path / "peft", target_modules=targets))
    assert_close(logits_of(load_trained(str(tmp_path / "peft"), "cpu").model, IDS), pefts)
    merge_trained(str(tmp_path / "peft"), tmp_path / "merged")
    assert_close(logits(hugging_face(tmp_path / "merged")), pefts)


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("llama", r".*\.1\.(self_attn\.q_proj|mlp\.up_proj)"),
        ("phi3", r"model\.layers\.\d+\..*(qkv|gate_up)_proj"),
    ],
)
def test_targets_that_are_a_regex(model, targets, base_of, tmp_path, logits_of):
    pefts = logits(save_with_peft(base_of(model), tmp_path / "peft", target_modules=targets))
    assert_close(logits_of(load_trained(str(tmp_path / "peft"), "cpu").model, IDS), pefts)
    own = logits_of(save_with_lorakit(base_of(model), tmp_path / "own", targets=targets), IDS)
    assert_close(logits(load_with_peft(base_of(model), tmp_path / "own")), own)


def test_head_that_is_the_embedding_cannot_be_merged(base_of, tmp_path):
    save_with_peft(base_of("llama"), tmp_path / "peft", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="lm_head shares its weight with the embedding"):
        merge_trained(str(tmp_path / "peft"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_head_that_was_changed_beside_its_adapter_is_refused(base_of, tmp_path):
    """PEFT stores the base's head with an adapter on it; lorakit takes it only as it was."""
    base = base_of("llama", tied=False)
    save_with_peft(base, tmp_path / "peft", target_modules=["lm_head"])
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 4] += 0.5
    save_file(tensors, file)
    for does in (lambda path, _: load_trained(path), merge_trained):
        with pytest.raises(UserError, match=r"brings a lm_head\.weight of its own"):
            does(str(tmp_path / "peft"), tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    ],
)
@pytest.mark.parametrize("does", [lambda path, _: load_trained(path), merge_trained])
def test_parts_of_peft_that_lorakit_has_not(settings, said, does, base_of, tmp_path):
    save_with_peft(base_of("llama", tied=False), tmp_path / "peft", **settings)
    with pytest.raises(UserError, match=said):
        does(str(tmp_path / "peft"), tmp_path / "merged")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", "four", 'rank: expected a whole number, got "four"'),
        ("lora_alpha", 0, "alpha: must be > 0"),
        ("rank_pattern", [1], "rank_pattern: expected a table"),
        ("rank_pattern", {"q_proj": 9}, r"shape: .*q_proj\.lora_A\.weight is \[4, 32\]"),
    ],
)
def test_config_that_is_no_config(key, value, said, base_of, tmp_path):
    save_with_lorakit(base_of("llama"), tmp_path / "own")
    file = tmp_path / "own" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=said):
        merge_trained(str(tmp_path / "own"), tmp_path / "merged")


def test_every_model_type_is_among_them():
    """All that first-party families build; `gemma3`, with images, is claimed only to be refused."""
    first = {offer for plugin in first_party() for offer in plugin.provides}
    families = [f for f in CATALOG.all("model family") if f"model family: {f.name}" in first]
    assert {t for family in families for t in family.model_types} - {"gemma3"} == set(MODELS)
