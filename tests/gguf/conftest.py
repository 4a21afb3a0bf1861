"""A tiny random llama model, and GGUF files of it as llama.cpp's converter would write them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("1", "2"), ("Ġ", "Ġ")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def byte_level_fields() -> dict[str, Any]:
    """A vocabulary of special tokens, all bytes, and a few merges."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(a + b for a, b in MERGES), "<tool>"]
    kinds = [1] * len(tokens)
    kinds[:3] = [3, 3, 3]
    kinds[-1] = 4
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def to_gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, middle = name.split(".", 3)
    module, kind = middle.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k (LlamaModel.permute in convert_hf_to_gguf.py)."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


class TinyLlama:
    """A random llama model: `config` (config.json's keys) and `tensors` by Hugging Face name."""

    def __init__(self, *, width: int = 64, tied: bool = True, biased: bool = False) -> None:
        vocabulary = len(byte_level_fields()["tokenizer.ggml.tokens"])
        self.config: dict[str, Any] = {
            "hidden_size": width,
            "intermediate_size": width + width // 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": width // 4,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128,
            "rope_theta": 50000.0,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "attention_bias": biased,
            "mlp_bias": biased,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        inner, keys = self.config["intermediate_size"], width // 2
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocabulary, width),
            "model.norm.weight": (width,),
        }
        if not tied:
            shapes["lm_head.weight"] = (vocabulary, width)
        linears = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        for layer in range(2):
            start = f"model.layers.{layer}"
            shapes[f"{start}.input_layernorm.weight"] = (width,)
            shapes[f"{start}.post_attention_layernorm.weight"] = (width,)
            for name, shape in linears.items():
                shapes[f"{start}.{name}.weight"] = shape
                if biased:
                    shapes[f"{start}.{name}.bias"] = shape[:1]
        random = np.random.default_rng(0)
        self.tensors = {
            name: random.standard_normal(shape, dtype=np.float32) * 0.2
            for name, shape in shapes.items()
        }

    def fields(self) -> dict[str, Any]:
        config = self.config
        return {
            "llama.block_count": config["num_hidden_layers"],
            "llama.context_length": config["max_position_embeddings"],
            "llama.embedding_length": config["hidden_size"],
            "llama.feed_forward_length": config["intermediate_size"],
            "llama.attention.head_count": config["num_attention_heads"],
            "llama.attention.head_count_kv": config["num_key_value_heads"],
            "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            "llama.rope.freq_base": config["rope_theta"],
            "llama.rope.dimension_count": config["head_dim"],
            "llama.vocab_size": config["vocab_size"],
            **byte_level_fields(),
        }

    def stored(self, kind: str = "F32") -> dict[str, tuple[np.ndarray, Any]]:
        """llama.cpp's name -> (bytes or values, type): matrices in `kind`, vectors in F32."""
        result = {}
        for name, tensor in self.tensors.items():
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
            for part, count in heads.items():
                if part in name:
                    tensor = permute(tensor, self.config[count])  # noqa: PLW2901
            quant = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
            result[to_gguf_name(name)] = (gguf.quants.quantize(tensor, quant), quant)
        return result

    def write(
        self,
        path: Path,
        kind: str = "F32",
        *,
        fields: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Any] | None = None,
        architecture: str = "llama",
    ) -> Path:
        """A GGUF file; `fields` and `tensors` add to the usual ones, or with None leave out."""
        return write_gguf(
            path, {**self.fields(), **(fields or {})}, {**self.stored(kind), **(tensors or {})},
            architecture,
        )  # fmt: skip


def write_gguf(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any], architecture: str = "llama"
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, stored in tensors.items():
        if stored is not None:
            values, quant = stored
            writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Task:
    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount


class RecordedProgress:
    """Progress that only remembers its tasks."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        self.tasks.append(Task(description, total, unit))
        yield self.tasks[-1]


class TinyWheel:
    """A wheel with a GGUF file in it, in a directory for `pip --find-links`."""

    requirement = "lorakit-tiny-model==1.0"
    member = "tiny_model/Tiny.F32.gguf"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "lorakit_tiny_model-1.0-py3-none-any.whl"
        content = TinyLlama().write(directory / "tiny.gguf").read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        info = "lorakit_tiny_model-1.0.dist-info"
        metadata = "Metadata-Version: 2.1\nName: lorakit-tiny-model\nVersion: 1.0\n"
        wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        names = [self.member, f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"]
        record = "".join(f"{name},,\n" for name in names)
        with zipfile.ZipFile(self.file, "w") as archive:
            for name, data in zip(names, [content, metadata, wheel, record], strict=True):
                archive.writestr(name, data)

    @property
    def url(self) -> str:
        return f"pypi:{self.requirement}/{self.member}#sha256={self.sha256}"


@pytest.fixture
def tiny() -> TinyLlama:
    return TinyLlama()


@pytest.fixture
def make_tiny() -> type[TinyLlama]:
    return TinyLlama


@pytest.fixture
def make_gguf() -> Callable[..., Path]:
    return write_gguf


@pytest.fixture
def progress() -> RecordedProgress:
    return RecordedProgress()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> TinyWheel:
    return TinyWheel(tmp_path_factory.mktemp("wheel"))
