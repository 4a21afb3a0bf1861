"""Every architecture: a random transformers model, written as llama.cpp's converter writes it
(names and keys by the gguf package's own tables), read back, and held against the model itself and
against transformers' GGUF loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import field, frozen

import gguf
from lorakit.base_model import build_on_meta
from lorakit.catalog import load_catalog
from lorakit.errors import UserError
from lorakit.progress import SilentProgress
from lorakit.weights.base import family_of
from lorakit.weights.stream import check_tensors, stream_weights
from lorakit_gguf.checkpoint import GGUFCheckpoint

transformers = pytest.importorskip("transformers")

ARCH = gguf.MODEL_ARCH
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.125 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}


@frozen(kw_only=True)
class Case:
    """`model_type` and config in transformers; `keys(writer, config)` writes what is its own."""

    arch: Any
    model_type: str
    config: Mapping[str, Any] = field(factory=dict)
    keys: Callable[[Any, Any], None] = lambda writer, config: None
    extra: Mapping[str, list[float]] = field(factory=dict)
    named: str = "A model"
    theirs: bool = True  # transformers' loader reads this architecture, and gets it right


def head_dim(writer: Any, config: Any) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def gemma2_keys(writer: Any, config: Any) -> None:
    head_dim(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def gemma3_keys(writer: Any, config: Any) -> None:
    head_dim(writer, config)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_sliding_window(config.sliding_window)


def scaled_gemma3_keys(writer: Any, config: Any) -> None:
    gemma3_keys(writer, config)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def phi3_keys(writer: Any, config: Any) -> None:
    writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * 16))
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


def longrope_keys(writer: Any, config: Any) -> None:
    phi3_keys(writer, config)
    scale = config.max_position_embeddings / config.original_max_position_embeddings
    factor = math.sqrt(1 + math.log(scale) / math.log(config.original_max_position_embeddings))
    writer.add_rope_scaling_attn_factors(factor)


GEMMA = {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True}
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA3 = {**GEMMA2, "num_hidden_layers": 7}
PHI3 = {"tie_word_embeddings": False, "original_max_position_embeddings": 256}
CASES = {
    "llama": Case(arch=ARCH.LLAMA, model_type="llama"),
    "mistral-v0.1": Case(
        arch=ARCH.LLAMA,
        model_type="mistral",
        named="mistralai_Mistral-7B-v0.1",
        config={"max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "mistral-v0.3": Case(
        arch=ARCH.LLAMA,
        model_type="mistral",
        named="Mistral 7B Instruct v0.3",
        config={"rope_theta": 1e6, "max_position_embeddings": 32768, "sliding_window": None},
    ),
    "qwen2": Case(arch=ARCH.QWEN2, model_type="qwen2", config={"rope_theta": 1e6}),
    "qwen2-tied": Case(arch=ARCH.QWEN2, model_type="qwen2", config={"tie_word_embeddings": True}),
    "qwen3": Case(arch=ARCH.QWEN3, model_type="qwen3", config={"head_dim": 128}, keys=head_dim),
    "gemma": Case(arch=ARCH.GEMMA, model_type="gemma", config=GEMMA, keys=head_dim, theirs=False),
    "gemma2": Case(arch=ARCH.GEMMA2, model_type="gemma2", config=GEMMA2, keys=gemma2_keys),
    "gemma3": Case(arch=ARCH.GEMMA3, model_type="gemma3_text", config=GEMMA3, keys=gemma3_keys),
    "gemma3-scaled": Case(
        arch=ARCH.GEMMA3,
        model_type="gemma3_text",
        config={**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        keys=scaled_gemma3_keys,
        theirs=False,  # it leaves rope.scaling of gemma3 out
    ),
    "phi3": Case(
        arch=ARCH.PHI3,
        model_type="phi3",
        config={**PHI3, "sliding_window": 16},
        keys=phi3_keys,
    ),
    "phi3-longrope": Case(
        arch=ARCH.PHI3,
        model_type="phi3",
        config={**PHI3, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
        keys=longrope_keys,
        extra={
            "rope_factors_short.weight": LONGROPE["short_factor"],
            "rope_factors_long.weight": LONGROPE["long_factor"],
        },
        theirs=False,  # it leaves the factors out
    ),
    "phi4-mini": Case(
        arch=ARCH.PHI3,
        model_type="phi3",
        config={**PHI3, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        keys=phi3_keys,
        theirs=False,  # it takes the whole head for rotary
    ),
}


def make(case: Case) -> Any:
    config = transformers.AutoConfig.for_model(case.model_type, **{**SMALL, **case.config})
    # Older releases take SDPA, which knows no soft-cap.
    eager = {"attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **eager).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.dim() == 1 else 1.2 / parameter.shape[-1] ** 0.5
            parameter.copy_(noise * scale + ("norm" in name and "gemma" not in case.model_type))
    return model


def write(model: Any, case: Case, path: Path) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.arch])
    writer.add_name(case.named)
    writer.add_vocab_size(config.vocab_size)
    writer.add_pad_token_id(0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "rope_theta" in config.rope_parameters:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    case.keys(writer, config)
    names = gguf.get_tensor_name_map(case.arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if case.arch == ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            query = "q_proj" in name
            heads = config.num_attention_heads if query else config.num_key_value_heads
            # LlamaModel.permute
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if "gemma" in case.model_type and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    for name, factors in case.extra.items():
        writer.add_tensor(name, torch.tensor(factors).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(found: torch.Tensor, expected: torch.Tensor, name: str, case: Case) -> None:
    if "gemma" in case.model_type and name.endswith("norm.weight"):
        # Adding one and taking it off again rounds.
        assert (found - expected).abs().max() < 2e-7, name
    else:
        assert torch.equal(found, expected), name


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_tensors_and_config(case: Case, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = make(case)
    checkpoint = GGUFCheckpoint.open(write(model, case, tmp_path / "m.gguf"))
    assert checkpoint.config["model_type"] == case.model_type
    found = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    expected = model.state_dict()
    assert expected.keys() - found.keys() <= {"lm_head.weight"}
    for name, tensor in found.items():
        same(tensor, expected[name], name, case)

    settings = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(case.model_type, **settings)
    eager = {"attn_implementation": "eager"}
    again = transformers.AutoModelForCausalLM.from_config(config, **eager).eval()
    again.load_state_dict(found, strict=not config.tie_word_embeddings)
    tokens = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens).logits
        assert (again(tokens).logits - wanted).abs().max() < 1e-5

    catalog = load_catalog()
    family = family_of(checkpoint.config, catalog, checkpoint.path)
    ours = build_on_meta(family, checkpoint.config, family.options(path="m"))
    check_tensors(ours, checkpoint)
    stream_weights(
        ours,
        checkpoint,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=SilentProgress(),
    )
    from lorakit.modules import Layout

    with torch.no_grad():
        states = ours.hidden(tokens[0], Layout.of_lengths([40]))
        assert (ours.logits(states) - wanted[0]).abs().max() < 1e-4


def test_transformers_loads_the_same_from_the_file(case: Case, tmp_path: Path) -> None:
    if not case.theirs:
        pytest.skip("transformers' loader does not read this, or leaves something out")
    path = write(make(case), case, tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    for name, tensor in GGUFCheckpoint.open(path).tensors():
        assert torch.equal(tensor, theirs[name]), name


# ---------------------------------------------------------------- what a file leaves out


def config_of(name: str, tmp_path: Path, **changes: Any) -> Mapping[str, Any]:
    case = CASES[name]
    return GGUFCheckpoint.open(write(make(case), case, tmp_path / "m.gguf")).config


def test_only_the_first_mistral_has_a_window(tmp_path: Path) -> None:
    assert config_of("mistral-v0.1", tmp_path)["sliding_window"] == 4096
    assert config_of("mistral-v0.3", tmp_path)["sliding_window"] is None


def test_gemma3s_layers_and_local_rope(tmp_path: Path) -> None:
    config = config_of("gemma3", tmp_path)
    assert config["layer_types"] == ["sliding_attention"] * 5 + [
        "full_attention",
        "sliding_attention",
    ]
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 10000.0)
    assert (config["query_pre_attn_scalar"], config["sliding_window"]) == (32, 16)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "a context of 256 on top of 16 without RoPE factors"),
        ({"rope_factors_long.weight": [1.0] * 8}, "rope_factors_short.weight has 0 values"),
        ({"rope_factors_short.weight": [1.0] * 3}, "rope_factors_short.weight has 3 values"),
    ],
)
def test_phi3_without_its_factors(
    extra: dict[str, list[float]], message: str, tmp_path: Path
) -> None:
    from attrs import evolve

    case = evolve(CASES["phi3-longrope"], extra=extra)
    path = write(make(case), case, tmp_path / "m.gguf")
    with pytest.raises(UserError, match=message):
        GGUFCheckpoint.open(path)
