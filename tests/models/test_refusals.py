"""What each family refuses of a config.json, and what it lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.catalog import load_catalog
from lorakit.errors import UserError
from lorakit.testing.checkpoints import meta_model
from lorakit.weights.base import check_family, family_of

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = ["llama", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "qwen2", "qwen3"]
LATE = ["gemma2", "gemma3_text"]
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def build(model_type, **changes):
    config = {"model_type": model_type, **TINY, **changes}
    return meta_model(family_of(config, load_catalog(), Path("config.json")), config)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"hidden_act": "relu", "hidden_activation": "relu"}, "= 'relu'"),
        ({"lm_head_bias": True}, "lm_head_bias = True"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"embedding_multiplier": 12.0, "logits_scaling": 2.0}, "logits_scaling = 2.0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected a table"),
        ({"rope_theta": -1.0, "rope_local_base_freq": -1.0}, "expected a number above 0"),
        ({"architectures": ["XForSequenceClassification"]}, "architectures"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a whole number"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
    ],
)
def test_every_family_refuses(model_type, changes, says):
    with pytest.raises(UserError) as caught:
        build(model_type, **changes)
    assert says in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("llama", {"sliding_window": 64}, "sliding_window = 64"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"architectures": ["LlamaBidirectionalModel"]}, "LlamaForCausalLM only"),
        ("llama", {"head_dim": 7}, "even number"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
            "rope_scaling.mscale = 0.7",
        ),
        (
            "llama",
            {
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            },
            "rope_parameters",
        ),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ("gemma2", {"sliding_window": None}, "no sliding window"),
        ("gemma2", {"sliding_window": 8, "sliding_window_size": 4}, "sliding_window_size = 4"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e5}}, "rope_parameters.rope_theta"),
        ("gemma3", {"text_config": {}, "vision_config": {}}, "reads images and text"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1"),
        ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop = 0.1"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod = 2"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("phi3", {"rope_scaling": {**LONG, "long_factor": [1.0]}}, "expected 4 numbers"),
        ("phi3", {"rope_scaling": {**LONG, "long_factor": [0.0] * 4}}, "numbers above 0"),
        ("phi3", {"rope_scaling": {**LONG, "long_mscale": 1.2}}, "long_mscale = 1.2"),
        ("qwen2", {"attention_bias": True}, "attention_bias = True"),
        ("qwen2", {"use_mrope": True}, "use_mrope = True"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "no sliding window"),
        ("qwen3", {"architectures": ["Qwen2ForCausalLM"]}, "Qwen3ForCausalLM only"),
    ],
)
def test_one_family_refuses(model_type, changes, says):
    with pytest.raises(UserError) as caught:
        build(model_type, **changes)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen3_moe", "qwen"), ("mixtral", "mistral"), ("gemma3n", "gemma"), ("phimoe", "phi3")],
)
def test_relatives_that_nobody_builds_are_refused_by_name(model_type, name):
    catalog = load_catalog()
    with pytest.raises(UserError, match=f"no installed plugin builds model_type '{model_type}'"):
        family_of({"model_type": model_type}, catalog, Path("config.json"))
    with pytest.raises(UserError, match=f"checkpoint's config.json says '{model_type}'"):
        check_family(catalog.get("model family", name), {"model_type": model_type}, catalog)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "phi3", "qwen"])
def test_the_owner_of_another_familys_config_is_named(name):
    catalog = load_catalog()
    other = "qwen2" if name != "qwen" else "llama"
    owner = "qwen" if name != "qwen" else "llama"
    with pytest.raises(UserError, match=f'Set model.name to "{owner}"'):
        check_family(catalog.get("model family", name), {"model_type": other}, catalog)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_without_effect_pass(model_type):
    build(
        model_type,
        attention_dropout=0.0,
        auto_map={"AutoModelForCausalLM": "modeling.Model"},
        dtype="bfloat16",
        eos_token_id=[1, 106],
        id2label={"0": "LABEL_0"},
        max_length=20,
        num_experts=None,
        quantization_config=None,
        temperature=0.6,
        torch_dtype="float16",
        unsloth_fixed=True,
        use_cache=False,
        use_mrope=False,
        _attn_implementation_autoset=True,
        _name_or_path="somewhere",
    )


@pytest.mark.parametrize("model_type", LATE)
def test_a_null_soft_cap_is_none(model_type):
    assert build(model_type, final_logit_softcapping=None).logit_softcap is None


def test_a_soft_cap_left_out_is_that_of_transformers():
    assert build("gemma2").logit_softcap == 30.0
    assert build("gemma2").blocks[0].self_attn.softcap == 50.0
    assert build("gemma3_text").logit_softcap is None
