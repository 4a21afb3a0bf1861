"""Reading a llama model: names, permutation, dequantization and config.json."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gguf
import lorakit_gguf
from lorakit.errors import UserError
from lorakit_gguf.checkpoint import GGUFCheckpoint
from lorakit_gguf.convert import write_directory
from lorakit_gguf.file import GGUFFile

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def expected_values(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """The model's own tensors after a round trip through `kind`, never permuted.

    Quantization works along rows, so a permutation of rows changes nothing in it.
    """
    result = {}
    for name, tensor in model.tensors.items():
        quant = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        data = gguf.quants.quantize(tensor, quant)
        result[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, quant)))
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_the_models_own(make_tiny: Any, kind: str, tied: bool, tmp_path: Path) -> None:
    model = make_tiny(tied=tied, biased=not tied)
    checkpoint = GGUFCheckpoint.open(model.write(tmp_path / "m.gguf", kind))
    expected = expected_values(model, kind)
    found = dict(checkpoint.tensors())
    assert found.keys() == expected.keys()
    plain = {"F16": torch.float16, "BF16": torch.bfloat16}
    for name, tensor in found.items():
        matrix = expected[name].ndim == 2
        assert tensor.dtype == (plain.get(kind, torch.float32) if matrix else torch.float32)
        assert torch.equal(tensor.float(), expected[name]), name
    (shard,) = checkpoint.shards().values()
    assert {n: s.shape for n, s in shard.items()} == {n: tuple(t.shape) for n, t in found.items()}
    assert shard["model.layers.1.mlp.up_proj.weight"].dtype == kind
    assert shard["model.norm.weight"].dtype == "F32"
    usual = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert checkpoint.config == {
        **model.config,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_scaling": None,
        "torch_dtype": usual,
    }


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants(make_tiny: Any, kind: str, tmp_path: Path) -> None:
    model = make_tiny(width=512)
    stored = model.stored("F32")
    quant = gguf.GGMLQuantizationType[kind]
    name = "blk.1.ffn_gate.weight"
    shape = stored[name][0].shape
    size = shape[1] // 256 * gguf.GGML_QUANT_SIZES[quant][1]
    data = np.random.default_rng(1).integers(0, 60, (shape[0], size), dtype=np.uint8)
    path = model.write(tmp_path / "m.gguf", tensors={name: (data, quant)})
    found = dict(GGUFCheckpoint.open(path).tensors())["model.layers.1.mlp.gate_proj.weight"]
    assert found.shape == shape
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(data, quant)))


def test_tensors_may_be_written_to(tiny: Any, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf")
    before = path.read_bytes()
    for _, tensor in GGUFCheckpoint.open(path).tensors("model.safetensors"):
        tensor.zero_()
    assert path.read_bytes() == before


def test_pages_that_were_read_are_let_go_of(make_tiny: Any, tmp_path: Path) -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("measured with Linux's /proc")
    path = make_tiny(width=1024).write(tmp_path / "m.gguf", "Q8_0")
    resident = []
    for _ in GGUFCheckpoint.open(path).tensors():
        mapped = smaps.read_text().split(str(path))[1]
        resident.append(1024 * int(mapped.split("Rss:")[1].split()[0]))
    assert max(resident) < 3e6 < path.stat().st_size / 4


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_directory_is_the_model_transformers_loads_from_the_file(
    make_tiny: Any, kind: str, tied: bool, progress: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = make_tiny(tied=tied)
    path = model.write(tmp_path / "m.gguf", kind)
    (directory := tmp_path / "converted").mkdir()
    write_directory(GGUFCheckpoint.open(path), directory, progress)
    ours = transformers.LlamaForCausalLM.from_pretrained(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    if kind == "F32":
        config = transformers.LlamaConfig(**model.config)
        original = transformers.LlamaForCausalLM(config)
        weights = {name: torch.from_numpy(t) for name, t in model.tensors.items()}
        original.load_state_dict(weights, strict=not tied)
        assert torch.equal(ours(tokens).logits, original(tokens).logits)


def test_files_without_optional_metadata(tiny: Any, tmp_path: Path) -> None:
    gone = dict.fromkeys(
        ["llama.vocab_size", "llama.rope.freq_base", "llama.rope.dimension_count"], None
    )
    config = GGUFCheckpoint.open(tiny.write(tmp_path / "m.gguf", fields=gone)).config
    assert config["vocab_size"] == tiny.config["vocab_size"]
    assert config["rope_theta"] == 10000.0
    assert config["head_dim"] == 16


def test_a_file_without_tokenizer(tiny: Any, tmp_path: Path) -> None:
    gone = {key: None for key in tiny.fields() if key.startswith("tokenizer.")}
    checkpoint = GGUFCheckpoint.open(tiny.write(tmp_path / "m.gguf", fields=gone))
    assert checkpoint.files() == {}
    assert checkpoint.config["bos_token_id"] is None


BIAS = (np.zeros(64, np.float32), gguf.GGMLQuantizationType.F32)


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"llama.expert_count": 8}, {}, "a mixture of experts"),
        ({"llama.logit_scale": 0.5}, {}, "its llama.logit_scale is 0.5"),
        ({"llama.attention.causal": False}, {}, "no language model"),
        ({"llama.attention.value_length": 8}, {}, "16 key and 8 value dimensions"),
        ({"llama.rope.dimension_count": 8}, {}, "8 of them rotary"),
        ({"llama.attention.head_count_kv": 3}, {}, "impossible"),
        ({"llama.attention.head_count_kv": [2, 2]}, {}, "should be of type int"),
        ({"llama.block_count": 4_000_000_000}, {}, "impossible"),
        ({"llama.block_count": 3}, {}, "without the tensors blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, {}, "no place for: blk.1.*and 6 more"),
        ({"llama.feed_forward_length": 128}, {}, r"ffn_gate.weight has shape \[96, 64\]"),
        ({"llama.attention.head_count": 2}, {}, "attn_q.weight has shape|rotary"),
        ({"llama.embedding_length": None}, {}, "llama.embedding_length is missing"),
        ({"llama.vocab_size": 5}, {}, "tokens for an embedding of 5 rows"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, {}, "longrope"),
        ({}, {"output_norm.weight": None}, "without the tensors output_norm.weight"),
        ({}, {"blk.0.attn_q_norm.weight": BIAS}, "no place for: blk.0.attn_q_norm.weight"),
        ({}, {"blk.0.attn_q.bias": BIAS}, "has blk.0.attn_q.bias, but not blk.1.attn_q.bias"),
    ],
)
def test_what_the_model_class_has_no_place_for(
    tiny: Any, fields: Mapping[str, Any], tensors: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "m.gguf", fields=fields, tensors=tensors)
    with pytest.raises(UserError, match=message) as error:
        GGUFCheckpoint.open(path)
    assert str(path) in error.value.message


def test_an_unknown_architecture(tiny: Any, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", architecture="mamba")
    with pytest.raises(UserError, match="architecture 'mamba'; supported: llama"):
        GGUFCheckpoint.open(path)


# ---------------------------------------------------------------- RoPE scaling


def llama_cpp_divisors(
    theta: float, dim: int, factor: float, low: float, high: float, context: int
) -> np.ndarray:
    """As LlamaModel.generate_extra_tensors in llama.cpp's convert_hf_to_gguf.py works them out."""
    result = []
    for frequency in 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * torch.pi / frequency
        if wavelength < context / high:
            result.append(1.0)
        elif wavelength > context / low:
            result.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            result.append(float(1 / ((1 - smooth) / factor + smooth)))
    return np.array(result, np.float32)


@pytest.mark.parametrize(
    ("theta", "width", "factor", "high", "context"),
    [
        (500000.0, 512, 8.0, 4.0, 8192),  # Llama 3.1
        (500000.0, 256, 32.0, 4.0, 8192),  # Llama 3.2 1B
        (500000.0, 512, 4.0, 3.0, 4096),
        (1000000.0, 512, 16.0, 4.0, 32768),
    ],
)
def test_llama3_scaling_is_found_in_the_divisors(
    make_tiny: Any, theta: float, width: int, factor: float, high: float, context: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = make_tiny(width=width)
    divisors = llama_cpp_divisors(theta, width // 4, factor, 1.0, high, context)
    path = model.write(
        tmp_path / "m.gguf",
        fields={"llama.rope.freq_base": theta},
        tensors={"rope_freqs.weight": (divisors, gguf.GGMLQuantizationType.F32)},
    )
    checkpoint = GGUFCheckpoint.open(path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": pytest.approx(high, abs=0.02),
        "original_max_position_embeddings": pytest.approx(context, rel=0.01),
    }
    assert dict(checkpoint.tensors()).keys() == model.tensors.keys()

    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(**checkpoint.config)
    found = llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    plain = theta ** -(np.arange(width // 8) / (width // 8))
    np.testing.assert_allclose(found, plain / divisors, rtol=2e-4)


def test_divisors_of_another_kind_are_refused(tiny: Any, tmp_path: Path) -> None:
    divisors = (np.linspace(1, 7, 8, dtype=np.float32), gguf.GGMLQuantizationType.F32)
    with pytest.raises(UserError, match="not those of Llama 3"):
        GGUFCheckpoint.open(
            tiny.write(tmp_path / "m.gguf", tensors={"rope_freqs.weight": divisors})
        )
    ones = (np.ones(8, np.float32), gguf.GGMLQuantizationType.F32)
    path = tiny.write(tmp_path / "ones.gguf", tensors={"rope_freqs.weight": ones})
    assert GGUFCheckpoint.open(path).config["rope_scaling"] is None


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_scaling_keys(
    tiny: Any, fields: Mapping[str, Any], scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    named = {f"llama.rope.scaling.{key}": value for key, value in fields.items()}
    checkpoint = GGUFCheckpoint.open(tiny.write(tmp_path / "m.gguf", fields=named))
    assert checkpoint.config["rope_scaling"] == scaling


# ---------------------------------------------------------------- what a plugin offers


def test_claims(tiny: Any, tmp_path: Path) -> None:
    (form,) = lorakit_gguf.lorakit_weight_formats()
    (source,) = lorakit_gguf.lorakit_model_sources()
    path = tiny.write(tmp_path / "m.gguf")
    assert form.claims(path)
    assert form.claims(tmp_path)
    assert form.open(tmp_path).path == path
    (tmp_path / "config.json").write_text("{}")
    assert not form.claims(tmp_path)
    (several := tmp_path / "several").mkdir()
    for name in ("one", "two.gguf"):
        (several / name).write_bytes(path.read_bytes())
    assert form.claims(several / "one")  # by its magic
    (several / "one").rename(several / "one.gguf")
    assert not form.claims(several)
    assert not form.claims(tmp_path / "none.gguf")
    assert not form.claims(tmp_path / "config.json")
    assert source.claims("pypi:anything")
    assert not source.claims("meta-llama/Llama-3.2-1B")
    assert not source.claims(str(path))


def test_the_entry_point_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, lorakit_gguf as plugin\n"
        "plugin.lorakit_weight_formats(), plugin.lorakit_model_sources()\n"
        "print(sorted({'torch', 'numpy', 'gguf', 'tokenizers', 'pip'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_types_of_metadata_are_checked(tiny: Any, tmp_path: Path) -> None:
    file = GGUFFile(tiny.write(tmp_path / "m.gguf"))
    assert file.get("llama.block_count", float) == 2.0
    with pytest.raises(UserError, match="should be of type str, but is of type int"):
        file.get("llama.block_count", str)
