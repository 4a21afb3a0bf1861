"""A 7B model quantized, adapted and trained for a step by shapes alone.

On the meta device that is all of it.  On a fake CUDA device it is the quantized layers' forward
pass: for autograd, and to move a tensor, torch asks for the real device's libraries.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit import assemble
from lorakit.base_model import build_on_meta
from lorakit.catalog import load_catalog
from lorakit.loop import trainable_parameters
from lorakit.modules import StoredLinear
from lorakit.modules import frozen as frozen_linear
from lorakit.progress import SilentProgress
from lorakit.recipes import resolve_recipe
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
ROOT = Path(__file__).resolve().parents[2]


def write_holes(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A sharded bf16 checkpoint whose weights are holes in sparse files: no byte of the 14.5 GB
    is on the disk, and the meta device reads none."""
    weight_map = {}
    for shard, chunk in enumerate(list(shapes)[n : n + 9] for n in range(0, len(shapes), 9)):
        header, end = {}, 0
        for name in chunk:
            start, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = directory / f"model-{shard:05d}.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + end)
        weight_map |= dict.fromkeys(chunk, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(MISTRAL_7B))


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


def test_mistral_7b_qlora_assembles_and_steps_on_the_meta_device(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    write_holes(tmp_path, {n: tuple(p.shape) for n, p in mistral_on_meta().named_parameters()})
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = [{"instruction": f"{n}?", "input": "", "output": "No. " * 40} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {
        "model.path": str(tmp_path),
        "data.path": str(tmp_path / "data.jsonl"),
    }
    recipe = resolve_recipe(f"{ROOT / 'recipes.toml'}:mistral_7b_qlora", overrides=changes)
    meta = torch.device("meta")
    monkeypatch.setattr(assemble, "resolve_device", lambda name: meta)
    run = assemble.assemble(recipe, SilentProgress())

    model: Any = run.base.model
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert bytes_of(model) / linears == pytest.approx(4.127 / 8, rel=2e-3)
    assert len(run.adapted) == 7 * 32

    trained = trainable_parameters(model)
    optimizer = recipe.optimizer.record.build(trained, recipe.optimizer.options)
    batch = next(iter(run.plan.windows(0, 0)))[0].to(meta)
    hidden = model.hidden(batch.tokens, batch.layout)
    assert (hidden.shape, hidden.dtype) == ((len(batch.tokens), 4096), torch.bfloat16)
    # Not the loss: which tokens are trained depends on values.
    model.logits(hidden).float().sum().backward()
    assert len(trained) == len(optimizer.param_groups[0]["params"]) == 2 * 7 * 32
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
