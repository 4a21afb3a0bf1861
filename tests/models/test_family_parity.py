"""Every family against transformers' models, on tiny configs; gradients against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from lorakit.generation import generate_ids
from lorakit.modules import Layout
from lorakit.weights.base import family_of

IDS = [5, 60, 17, 17, 41, 9, 63, 0, 44, 20, 37, 26, 3, 31, 12, 60, 33, 34, 35, 11, 8, 2, 50, 1]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 7}
LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_MORE = {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
PARTIAL = {"short_factor": [1.0, 1.2, 1.4], "long_factor": [1.0, 2.0, 3.0]}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "llama2": {"num_key_value_heads": 4, **UNTIED},
        "llama3_rope": {**LLAMA3, "rope_theta": 5e3, **UNTIED},
        "smollm2_tied": {**TIED, "rope_theta": 1e5},
        "mqa_biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        "rope_yarn": {"rope_scaling": YARN},
        "rope_yarn_all_fields": {"rope_scaling": YARN_MORE},
        "rope_linear": LINEAR,
    },
    "mistral": {
        "v0.1_window": WINDOW,
        "v0.3_no_window": {"sliding_window": None, "rope_theta": 1e6},
        "window_of_two": {"sliding_window": 2},
        "own_head_dim": {"head_dim": 12, **WINDOW},
        "mqa_tied": {"num_key_value_heads": 1, **TIED, **WINDOW},
        "rope_yarn": {"rope_scaling": YARN, **WINDOW},
    },
    "gemma": {
        "2b_mqa": {"num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu"},
        "7b_query_wider": {"num_key_value_heads": 4, "head_dim": 24},
        "untied_bias": {"head_dim": 8, "attention_bias": True, **UNTIED},
        "rope_linear": {"head_dim": 8, **LINEAR},
    },
    "gemma2": {
        "both_caps_alternating": {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
            **WINDOW,
        },
        "no_caps": {
            "head_dim": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            **WINDOW,
        },
        "layer_types": {"head_dim": 8, "layer_types": MIXED, **WINDOW},
    },
    "gemma3_text": {
        "5_to_1_two_bases": {
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            **WINDOW,
        },
        "pattern_scaled_global": {
            "head_dim": 8,
            "sliding_window_pattern": 2,
            "rope_theta": 1e5,
            "rope_local_base_freq": 1e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            **WINDOW,
        },
        "layer_types_final_cap": {
            "head_dim": 8,
            "layer_types": MIXED,
            "final_logit_softcapping": 2.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
            },
            **WINDOW,
        },
    },
    "phi3": {
        "4k_window": {"num_key_value_heads": 4, "original_max_position_embeddings": 256, **WINDOW},
        "128k_long": {"rope_scaling": LONG, "original_max_position_embeddings": 16},
        "128k_short": {"rope_scaling": LONG, "original_max_position_embeddings": 24},
        "4_mini_partial_tied": {
            "rope_scaling": {**LONG, **PARTIAL},
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "sliding_window": 9,
            **TIED,
        },
        "4_partial_plain": {"partial_rotary_factor": 0.5, "rope_theta": 2.5e5},
        "mqa_given_scale": {
            "num_key_value_heads": 1,
            "rope_scaling": {**LONG, "attention_factor": 1.7},
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2": {
        "2.5_7b_untied": {**UNTIED, "rope_theta": 1e6, "sliding_window": 5, "max_window_layers": 1},
        "0.5b_tied": {**TIED, "rope_theta": 1e6},
        "window_from_layer_1": QWEN_WINDOW,
        "layer_types": {**QWEN_WINDOW, "layer_types": MIXED},
        "rope_yarn": {"rope_scaling": {**YARN, "type": "yarn"}},
    },
    "qwen3": {
        "4b_tied": {**TIED, "head_dim": 16, "rope_theta": 1e6},
        "8b_untied": {**UNTIED, "head_dim": 8},
        "bias_window": {"head_dim": 8, "attention_bias": True, **QWEN_WINDOW},
        "rope_yarn": {"head_dim": 8, "rope_scaling": YARN},
    },
}
# One of each is enough where the config's fields are not the point.
TYPICAL = {
    "llama": "llama3_rope",
    "mistral": "v0.1_window",
    "gemma": "2b_mqa",
    "gemma2": "both_caps_alternating",
    "gemma3_text": "5_to_1_two_bases",
    "phi3": "4_mini_partial_tied",
    "qwen2": "window_from_layer_1",
    "qwen3": "4b_tied",
}


def config_of(family: str, case: str) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **CASES[family][case]}


ALL = [
    pytest.param(family, case, id=f"{family}-{case}")
    for family, cases in CASES.items()
    for case in cases
]


typical = pytest.mark.parametrize(("family", "case"), TYPICAL.items(), ids=TYPICAL.keys())


def reference_logits(reference: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("written", ["published", "transformers"])
@pytest.mark.parametrize(("family", "case"), ALL)
def test_logits_equal_transformers(family, case, written, build_pair, logits_of, parity):
    pair = build_pair(config_of(family, case), written=written)
    expected = reference_logits(pair.reference, IDS)
    assert expected.std() > 0.3
    error = float((logits_of(pair.model, IDS) - expected).abs().max())
    parity(family, case, type(pair.reference).__name__, logits=error)
    assert error <= 1e-4


@pytest.mark.parametrize(("family", "case"), ALL)
def test_lora_gradients_equal_peft(family, case, build_pair, parity):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    from lorakit.adapters import PREFIX, adapted_modules, apply_adapter, load_adapter_tensors
    from lorakit.catalog import load_catalog
    from lorakit.loss import cross_entropy_sum

    pair = build_pair(config_of(family, case))
    name = type(pair.reference).__name__
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    reference = get_peft_model(pair.reference, config)
    ids = torch.tensor(IDS)
    logits = reference(ids[None]).logits[0]
    cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()

    method = load_catalog().get("adapter", "lora")
    options = method.options(rank=4, alpha=8.0)
    names = apply_adapter(pair.model, method, options, torch.float32)
    load_adapter_tensors(pair.model, names, get_peft_model_state_dict(reference), "peft")
    hidden = pair.model.hidden(ids, Layout.of_lengths([len(ids)]))
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    cross_entropy_sum(pair.model, hidden, labels).backward()

    expected = {
        name.removeprefix(PREFIX).replace(".default", ""): p.grad
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    found = {
        f"{name}.{suffix}": p.grad
        for name, wrapped in adapted_modules(pair.model, names)
        for suffix, p in wrapped.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == expected.keys()
    errors = {}
    for key, gradient in expected.items():
        assert gradient.abs().max() > 1e-4 or "layers.0" in key, key
        errors[key] = float((found[key] - gradient).abs().max() / gradient.abs().max())
    parity(family, case, name, gradients=max(errors.values()))
    assert max(errors.values()) <= 1e-4, max(errors, key=errors.__getitem__)


def test_longrope_by_its_first_name(build_pair, build_lorakit, logits_of):
    config = config_of("phi3", "128k_long")
    pair = build_pair(config)
    renamed = {**config, "rope_scaling": {**LONG, "type": "su"}}
    model = build_lorakit(renamed, pair.reference.state_dict())
    expected = reference_logits(pair.reference, IDS)
    torch.testing.assert_close(logits_of(model, IDS), expected, atol=1e-4, rtol=0)


# The part of a config that a case is about, and what stands there if it were overlooked.
OVERLOOKED = [
    ("llama", "llama3_rope", {"rope_scaling": None}),
    ("llama", "rope_yarn", {"rope_scaling": None}),
    ("llama", "rope_yarn_all_fields", {"rope_scaling": YARN}),
    ("mistral", "v0.1_window", {"sliding_window": None}),
    ("gemma2", "both_caps_alternating", {"attn_logit_softcapping": None}),
    ("gemma2", "both_caps_alternating", {"final_logit_softcapping": None}),
    ("gemma2", "both_caps_alternating", {"query_pre_attn_scalar": 16}),
    ("gemma2", "both_caps_alternating", {"layer_types": ["full_attention"] * 3}),
    ("gemma2", "both_caps_alternating", {"layer_types": ["sliding_attention"] * 3}),
    ("gemma3_text", "5_to_1_two_bases", {"rope_local_base_freq": 1e6}),
    ("gemma3_text", "5_to_1_two_bases", {"sliding_window_pattern": 3}),
    ("gemma3_text", "pattern_scaled_global", {"rope_scaling": None}),
    ("phi3", "128k_long", {"original_max_position_embeddings": 24}),
    ("phi3", "128k_long", {"max_position_embeddings": 64}),
    ("phi3", "4_partial_plain", {"partial_rotary_factor": 1.0}),
    ("qwen2", "window_from_layer_1", {"max_window_layers": 2}),
    ("qwen3", "bias_window", {"use_sliding_window": False}),
]


@pytest.mark.parametrize(("family", "case", "changes"), OVERLOOKED)
def test_overlooking_a_field_would_be_seen(family, case, changes, build_pair, logits_of):
    right = build_pair(config_of(family, case))
    wrong = build_pair({**config_of(family, case), **changes})
    difference = logits_of(right.model, IDS) - logits_of(wrong.model, IDS)
    assert difference.abs().max() > 1e-2


@typical
def test_documents_in_one_layout_equal_documents_one_by_one(family, case, build_pair, logits_of):
    """Shorter and longer than windows, and than LongRoPE's original context."""
    pair = build_pair(config_of(family, case))
    documents = [IDS[:7], IDS[3:4], IDS, IDS[5:]]
    joined = torch.tensor([i for document in documents for i in document])
    with torch.no_grad():
        hidden = pair.model.hidden(joined, Layout.of_lengths([len(d) for d in documents]))
        parts = pair.model.logits(hidden).split([len(d) for d in documents])
    for part, document in zip(parts, documents, strict=True):
        torch.testing.assert_close(part, logits_of(pair.model, document), atol=1e-5, rtol=0)
        expected = reference_logits(pair.reference, document)
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=0)


@typical
def test_every_model_type_conforms(family, case):
    from lorakit.catalog import load_catalog
    from lorakit.testing import check_model_family

    config = config_of(family, case)
    check_model_family(family_of(config, load_catalog(), Path("config.json")), config)


@pytest.mark.parametrize("prompt", [5, 20])
@typical
def test_greedy_generation_equals_transformers(family, case, prompt, build_pair):
    """Over the cache, past every window, and past LongRoPE's original context."""
    pair = build_pair(config_of(family, case))
    ids = torch.tensor([IDS[:prompt]])
    generated = pair.reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = generate_ids(pair.model, IDS[:prompt], max_new_tokens=40, stop_ids=frozenset())
    assert list(found) == generated[0, prompt:].tolist()


@typical
def test_bf16_is_no_further_from_fp32_than_transformers(
    family, case, build_pair, build_lorakit, logits_of
):
    config = config_of(family, case)
    pair = build_pair(config)
    exact = reference_logits(pair.reference, IDS)
    half = pair.reference.to(torch.bfloat16)
    model = build_lorakit(config, half.state_dict())
    theirs = (reference_logits(half, IDS).float() - exact).abs().mean()
    ours = (logits_of(model, IDS).float() - exact).abs().mean()
    assert logits_of(model, IDS).dtype == torch.bfloat16
    assert ours < 1.25 * theirs
