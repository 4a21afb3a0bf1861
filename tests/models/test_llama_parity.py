"""lorakit's Llama against transformers' LlamaForCausalLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorakit.errors import UserError
from lorakit.generation import generate_ids
from lorakit.modules import Layout
from lorakit.trained import load_trained

IDS = [5, 300, 17, 17, 201, 9, 383, 0, 44, 120, 77, 256, 3, 91, 12, 260, 33, 34, 35, 111]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "grouped_queries": {},
    "one_kv_head_a_head": {"num_key_value_heads": 4},
    "one_kv_head": {"num_key_value_heads": 1},
    "untied_head": {"tie_word_embeddings": False},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_dim_of_its_own": {"head_dim": 16},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope_linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    "rope_llama3": {"rope_parameters": LLAMA3},
}


def hugging_face(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def reference_logits(path, ids):
    with torch.no_grad():
        return hugging_face(path)(torch.tensor([ids])).logits[0]


def with_config(checkpoint: Path, place: Path, **changes) -> Path:
    """A copy of a checkpoint with other fields in config.json; None takes one out."""
    shutil.copytree(checkpoint, place)
    config = json.loads((place / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_transformers(shape, make_checkpoint, logits_of):
    path = make_checkpoint(**shape)
    expected = reference_logits(path, IDS)
    assert expected.abs().max() > 1
    found = logits_of(load_trained(str(path)).model, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_scaled_rope_changes_the_logits(make_checkpoint):
    plain = reference_logits(make_checkpoint(), IDS)
    for name in ("rope_theta", "rope_linear", "rope_llama3"):
        scaled = reference_logits(make_checkpoint(**SHAPES[name]), IDS)
        assert (scaled - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        {"type": "linear", "factor": 4.0},
    ],
    ids=["none", "llama3", "type_linear"],
)
def test_config_of_transformers_4_gives_the_same_rope(scaling, tmp_path, checkpoint, logits_of):
    path = with_config(
        checkpoint,
        tmp_path / "old",
        rope_parameters=None,
        rope_theta=2000.0,
        rope_scaling=scaling,
    )
    found = logits_of(load_trained(str(path)).model, IDS)
    torch.testing.assert_close(found, reference_logits(path, IDS), atol=1e-4, rtol=0)


def test_documents_in_one_layout_equal_documents_one_by_one(make_checkpoint, logits_of):
    path = make_checkpoint(**SHAPES["rope_llama3"])
    documents = [IDS[:7], IDS[3:4], IDS, IDS[5:]]
    model = load_trained(str(path)).model
    joined = torch.tensor([i for document in documents for i in document])
    with torch.no_grad():
        hidden = model.hidden(joined, Layout.of_lengths([len(d) for d in documents]))
        parts = model.logits(hidden).split([len(d) for d in documents])
    for part, document in zip(parts, documents, strict=True):
        torch.testing.assert_close(part, logits_of(model, document), atol=1e-5, rtol=0)
        torch.testing.assert_close(part, reference_logits(path, document), atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_lora_gradients_equal_peft(activation_checkpointing, checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    from lorakit.blocks import checkpoint_blocks
    from lorakit.loss import cross_entropy_sum

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    reference = get_peft_model(hugging_face(checkpoint), config)
    reference.save_pretrained(tmp_path)
    ids = torch.tensor(IDS)
    logits = reference(ids[None]).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()

    model = load_trained(str(tmp_path)).model.train()
    if activation_checkpointing:
        checkpoint_blocks(model)
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    hidden = model.hidden(ids, Layout.of_lengths([len(ids)]))
    cross_entropy_sum(model, hidden, labels).backward()

    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 7 * 2
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error <= 1e-4, name


@pytest.mark.parametrize("shape", ["grouped_queries", "rope_llama3", "untied_head"])
def test_greedy_generation_over_the_cache_equals_transformers(shape, make_checkpoint):
    path = make_checkpoint(**SHAPES[shape])
    reference = hugging_face(path)
    ids = torch.tensor([IDS])
    generated = reference.generate(
        ids,
        # Else transformers would take id 0 for padding, and mask it.
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = load_trained(str(path)).model
    found = generate_ids(model, IDS, max_new_tokens=40, stop_ids=frozenset())
    assert list(found) == generated[0, len(IDS) :].tolist()


def test_generation_ends_before_a_stop_id(checkpoint):
    model = load_trained(str(checkpoint)).model
    free = list(generate_ids(model, IDS, max_new_tokens=12, stop_ids=frozenset()))
    stop = free[6]
    stopped = list(generate_ids(model, IDS, max_new_tokens=12, stop_ids=frozenset({stop})))
    assert stopped == free[: free.index(stop)]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            ["rope_parameters.rope_type", "proportional"],
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["rope_scaling", "type", "dynamic"],
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_attention_heads": "four"}, ["num_attention_heads", "four"]),
        ({"attention_bias": "yes"}, ["attention_bias", "yes"]),
        ({"model_type": "llamma"}, ["llamma"]),
    ],
)
def test_config_that_cannot_be_honoured_is_named(changes, names, tmp_path, checkpoint):
    path = with_config(checkpoint, tmp_path / "model", **changes)
    with pytest.raises(UserError) as caught:
        load_trained(str(path))
    for name in names:
        assert name in str(caught.value)


def test_tensors_that_do_not_fit_the_config_are_all_named(tmp_path, checkpoint):
    path = with_config(checkpoint, tmp_path / "model", intermediate_size=40, mlp_bias=True)
    with pytest.raises(UserError) as caught:
        load_trained(str(path))
    message = str(caught.value)
    assert "12 problems" in message
    for layer in range(2):
        for linear in ("gate_proj", "up_proj", "down_proj"):
            assert f"missing: model.layers.{layer}.mlp.{linear}.bias" in message
            assert f"shape: model.layers.{layer}.mlp.{linear}.weight" in message


def test_weights_the_model_would_not_use_are_refused(tmp_path, checkpoint):
    path = with_config(checkpoint, tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"unexpected: model\.layers\.1\."):
        load_trained(str(path))


@pytest.mark.download
def test_smollm2_equals_transformers_on_the_converted_directory(logits_of, parity):
    """Real weights, real text: the quickstart's model, fetched as the recipe says."""
    from lorakit.catalog import load_catalog
    from lorakit.generation import prompt_ids
    from lorakit.progress import TerminalProgress
    from lorakit.protocols import Message
    from lorakit.recipes import resolve_recipe
    from lorakit.weights.base import fetch_base

    source = resolve_recipe("quickstart").model.options.path
    directory = fetch_base(source, load_catalog(), TerminalProgress())
    reference = hugging_face(directory)
    trained = load_trained(source, "cpu")
    tokenizer = trained.tokenizer

    turns = [
        Message("user", "What is the capital of France, and what is it known for?"),
        Message("assistant", "Paris. It is known for the Eiffel Tower, and for its museums."),
        Message("user", "Thank you! Is it larger than Lyon?"),
    ]
    text = tokenizer.render(turns, add_generation_prompt=True)
    ids = list(tokenizer.encode_rendered(text).ids)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    error = float((logits_of(trained.model, ids) - expected).abs().max())
    parity("llama", f"SmolLM2-135M, {len(ids)} tokens", "real weights", logits=error)
    assert error <= 1e-4

    prompt = prompt_ids(tokenizer, "What is the capital of France?")
    found = list(
        generate_ids(trained.model, prompt, max_new_tokens=32, stop_ids=tokenizer.stop_ids)
    )
    generated = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=32,
        eos_token_id=sorted(tokenizer.stop_ids),
        pad_token_id=0,
    )
    expected_ids = [i for i in generated[0, len(prompt) :].tolist() if i not in tokenizer.stop_ids]
    assert found == expected_ids
    assert "Paris" in tokenizer.decode(found)
