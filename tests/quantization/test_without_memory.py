"""A 7B model quantized, adapted and trained for a step by shapes alone.

On the meta device that is all of it.  On a fake CUDA device it is the quantized layers' forward
pass: for autograd, and to move a tensor, torch asks for the real device's libraries.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import frozen
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit.adapters import apply_adapter
from lorakit.base_model import build_on_meta
from lorakit.blocks import checkpoint_blocks
from lorakit.catalog import load_catalog
from lorakit.loop import trainable_parameters
from lorakit.modules import Layout, StoredLinear
from lorakit.modules import frozen as frozen_linear
from lorakit.progress import SilentProgress
from lorakit.protocols import TensorSpec
from lorakit.weights.stream import HEAD, stream_weights
from lorakit_bitsandbytes import nf4

MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
TOKENS = 256


@frozen
class ShapesOnly:
    """A checkpoint whose tensors have no memory."""

    shapes: dict[str, tuple[int, ...]]

    def shards(self) -> dict[str, dict[str, TensorSpec]]:
        return {"shard": {name: TensorSpec(s, "BF16") for name, s in self.shapes.items()}}

    def tensors(self, shard: str | None = None) -> Any:
        for name, shape in self.shapes.items():
            yield name, torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.fixture(autouse=True)
def no_path_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("a path that needs values, or a CPU")

    for name in ("_quantize_pieces", "_dequantize_pieces"):
        monkeypatch.setattr(nf4, name, never)
    monkeypatch.setattr(frozen_linear, "_buffers", None)


def mistral_on_meta() -> Any:
    family = load_catalog().get("model family", "mistral")
    return build_on_meta(family, MISTRAL_7B, family.options(path="mistral"))


def quantizer(scheme: str) -> Any:
    record = load_catalog().get("quantization", scheme)
    return lambda linear, weight: record.quantize(linear, weight, record.options(), torch.bfloat16)


def bytes_of(model: Any) -> int:
    stored = [m for m in model.modules() if isinstance(m, StoredLinear)]
    return sum(b.numel() * b.element_size() for m in stored for b in m.buffers())


@pytest.mark.parametrize(("scheme", "bytes_each"), [("nf4", 4.127 / 8), ("int8", 1.0)])
def test_a_step_on_the_meta_device(scheme: str, bytes_each: float) -> None:
    """Streamed, adapted and checkpointed as mistral_7b_qlora is: bf16, rank 64 everywhere."""
    model = mistral_on_meta()
    stream_weights(
        model,
        ShapesOnly({name: tuple(p.shape) for name, p in model.named_parameters()}),
        device=torch.device("meta"),
        dtype=torch.bfloat16,
        progress=SilentProgress(),
        quantize=quantizer(scheme),
        kept_linears=frozenset({HEAD}),
    )
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert bytes_of(model) / linears == pytest.approx(bytes_each, rel=2e-3)

    adapter = load_catalog().get("adapter", "lora")
    names = apply_adapter(model, adapter, adapter.options(rank=64, alpha=16), torch.float32)
    assert len(names) == 7 * 32
    checkpoint_blocks(model.train())
    tokens = torch.zeros(TOKENS, dtype=torch.long, device="meta")
    hidden = model.hidden(tokens, Layout.of_lengths([TOKENS], tokens.device))
    assert (hidden.shape, hidden.dtype) == ((TOKENS, 4096), torch.bfloat16)
    model.logits(hidden).float().sum().backward()
    trained = trainable_parameters(model)
    assert len(trained) == 2 * 7 * 32
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_all_linear_shapes_on_a_fake_cuda_device(scheme: str) -> None:
    quantize = quantizer(scheme)
    linears = {m.weight.shape: m for m in mistral_on_meta().modules() if type(m) is nn.Linear}
    assert len(linears) == 5
    with FakeTensorMode():
        for (outputs, inputs), linear in linears.items():
            weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device="cuda")
            layer = quantize(linear, weight)
            assert {buffer.device.type for buffer in layer.buffers()} == {"cuda"}
            y = layer(torch.empty(TOKENS, inputs, dtype=torch.bfloat16, device="cuda"))
            assert (y.shape, y.dtype) == ((TOKENS, outputs), torch.bfloat16)
            assert y.device.type == "cuda"
