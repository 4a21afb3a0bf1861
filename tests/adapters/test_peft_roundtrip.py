"""Adapters and merged models against PEFT and transformers, in both directions."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.errors import UserError
from lorakit.mergeable import merge_trained
from lorakit.trained import load_trained

IDS = [5, 300, 17, 17, 201, 9, 383, 0, 44, 120, 77, 256, 3, 91, 12, 260, 33, 34, 35, 111]
ADAPTERS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora_rslora": {"dora": True, "rslora": True},
    "alpha_of_a_fraction": {"alpha": 2.5},
    "list_of_names": {"targets": ["q_proj", "v_proj"]},
    "list_of_full_names": {"targets": ["layers.0.mlp.up_proj", "model.layers.2.self_attn.o_proj"]},
    "names_full_and_short": {"targets": ["q_proj", "layers.1.mlp.up_proj"]},
    "single_name": {"targets": "down_proj"},
    "regex": {"targets": r".*\.(q_proj|up_proj)"},
    "regex_over_some_layers": {"targets": r".*layers\.[01]\.self_attn\.(q|k)_proj"},
}
LAYERS = {"num_hidden_layers": 3}


def hugging_face(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def peft_of(base, adapter):
    """PEFT's model; fails on any key that is missing or unexpected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|ignored).*")
        model = PeftModel.from_pretrained(hugging_face(base), adapter).eval()
        result = model.load_adapter(adapter, adapter_name="again")
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if ".again" in key] == []
    trained = {k for k, _ in model.named_parameters() if ".default" in k}
    assert len(trained) == len(load_file(adapter / "adapter_model.safetensors"))
    return model


def assert_trained(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert tensor.abs().max() > 1e-4, key


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_trained_adapter_loads_in_peft_with_the_same_logits(
    options, make_checkpoint, train_run, logits_of
):
    base = make_checkpoint(**LAYERS)
    run = train_run(
        model=base,
        adapter={"rank": 4, "alpha": 8, **options},
        optimizer={"lr": 2e-2},
        training={"batch_size": 2},
    )
    assert_trained(run / "adapter")
    expected = logits(peft_of(base, run / "adapter"))
    assert (expected - logits(hugging_face(base))).abs().max() > 1e-2
    found = logits_of(load_trained(str(run)).model, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_head_of_an_untied_model_loads_in_peft(make_checkpoint, train_run, logits_of):
    base = make_checkpoint(tie_word_embeddings=False)
    run = train_run(
        model=base,
        adapter={"targets": ["q_proj", "lm_head"]},
        optimizer={"lr": 2e-2},
        training={"batch_size": 2},
    )
    assert_trained(run / "adapter")
    expected = logits(peft_of(base, run / "adapter"))
    found = logits_of(load_trained(str(run)).model, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


PEFT_CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.1\.(self_attn\.q_proj|mlp\.up_proj)"},
    "dropout": {"lora_dropout": 0.5},
}


def save_with_peft(base, directory, **settings):
    torch.manual_seed(7)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 6,
            "target_modules": "all-linear",
            "init_lora_weights": False,
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    model = get_peft_model(hugging_face(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("settings", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS.keys())
def test_adapter_saved_by_peft_gives_the_same_logits(settings, checkpoint, tmp_path, logits_of):
    expected = logits(save_with_peft(checkpoint, tmp_path / "adapter", **settings))
    assert (expected - logits(hugging_face(checkpoint))).abs().max() > 1e-2
    found = logits_of(load_trained(str(tmp_path / "adapter")).model, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS.keys())
def test_merged_directory_equals_the_adapter_applied(settings, checkpoint, tmp_path):
    expected = logits(save_with_peft(checkpoint, tmp_path / "adapter", **settings))
    merge_trained(str(tmp_path / "adapter"), tmp_path / "merged")
    torch.testing.assert_close(
        logits(hugging_face(tmp_path / "merged")), expected, atol=1e-4, rtol=0
    )


def test_merged_run_equals_its_adapter_applied(checkpoint, train_run, tmp_path):
    run = train_run(
        optimizer={"lr": 2e-2},
        training={"batch_size": 2, "epochs": 2},
        checkpointer={"save_merged": True, "save_merged_each_epoch": True},
    )
    expected = logits(peft_of(checkpoint, run / "adapter"))
    merge_trained(str(run), tmp_path / "merged")
    for directory in (run / "merged", tmp_path / "merged"):
        torch.testing.assert_close(logits(hugging_face(directory)), expected, atol=1e-4, rtol=0)
        assert not any(p.name.startswith("adapter") for p in directory.iterdir())
    first = logits(hugging_face(run / "merged-epoch-1"))
    assert (first - expected).abs().max() > 1e-3


def test_merged_tokenizer_is_the_one_of_training(train_run):
    run = train_run(data={"chat_template": "alpaca"}, checkpointer={"save_merged": True})
    for directory in (run / "adapter", run / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "why"}], tokenize=False, add_generation_prompt=True
        )
        assert text.endswith("\n\n### Instruction:\nwhy\n\n### Response:\n")


def test_sharded_base_merges_under_its_own_shard_names(make_checkpoint, tmp_path):
    base = make_checkpoint(max_shard_size="30KB", tie_word_embeddings=False)
    names = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(names) > 2
    expected = logits(save_with_peft(base, tmp_path / "adapter"))
    merge_trained(str(tmp_path / "adapter"), tmp_path / "merged")
    assert sorted(p.name for p in (tmp_path / "merged").glob("*.safetensors")) == names
    index = "model.safetensors.index.json"
    before = json.loads((base / index).read_text())
    assert json.loads((tmp_path / "merged" / index).read_text()) == before
    torch.testing.assert_close(
        logits(hugging_face(tmp_path / "merged")), expected, atol=1e-4, rtol=0
    )


def test_tied_head_stays_tied_when_merged(checkpoint, tmp_path):
    save_with_peft(checkpoint, tmp_path / "adapter")
    merge_trained(str(tmp_path / "adapter"), tmp_path / "merged")
    base = load_file(checkpoint / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.keys()
    assert "lm_head.weight" not in merged
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    model = hugging_face(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merge_keeps_the_base_dtype(checkpoint, tmp_path):
    hugging_face(checkpoint).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path / "base" / name)
    save_with_peft(tmp_path / "base", tmp_path / "adapter")
    merge_trained(str(tmp_path / "adapter"), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    dense = (base[f"{name}.weight"].double() + 6 / 4 * b @ a).to(torch.bfloat16)
    torch.testing.assert_close(merged[f"{name}.weight"], dense, atol=0, rtol=2**-7)


def test_merge_refuses_an_output_that_is_taken(checkpoint, tmp_path):
    save_with_peft(checkpoint, tmp_path / "adapter")
    taken = tmp_path / "merged"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        merge_trained(str(tmp_path / "adapter"), taken)
    assert [p.name for p in taken.iterdir()] == ["notes.txt"]


def test_merge_refuses_an_adapter_of_another_base(make_checkpoint, checkpoint, tmp_path):
    save_with_peft(make_checkpoint(**LAYERS), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(checkpoint)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"(?s)model\.layers\.2.*another base"):
        merge_trained(str(tmp_path / "adapter"), tmp_path / "merged")
    with pytest.raises(UserError, match=r"unexpected: .*model\.layers\.2"):
        load_trained(str(tmp_path / "adapter"))


def test_adapter_config_has_what_readers_need(checkpoint, train_run):
    run = train_run(adapter={"rank": 4, "alpha": 8, "rslora": True, "dropout": 0.25})
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    version = config.pop("peft_version")
    assert version[0].isdigit()
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint.resolve()),
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.25,
        "target_modules": [
            "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
        ],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": True,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
        "revision": None,
    }  # fmt: skip


def test_adapter_file_has_pefts_metadata_and_keys(train_run):
    run = train_run(adapter={"targets": ["q_proj"], "dora": True})
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = set(file.keys())
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.{}"
    suffixes = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
    assert keys == {prefix.format(layer, s) for layer in range(2) for s in suffixes}


def test_checkpoint_of_a_run_loads_in_peft(checkpoint, train_run):
    run = train_run()
    (step,) = (run / "checkpoints").iterdir()
    final = logits(peft_of(checkpoint, run / "adapter"))
    torch.testing.assert_close(logits(peft_of(checkpoint, step)), final, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("target_modules", None),
        ("peft_type", "IA3"),
    ],
)
def test_peft_setting_that_is_not_supported_is_named(key, value, checkpoint, tmp_path):
    save_with_peft(checkpoint, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=key):
        load_trained(str(tmp_path / "adapter"))
