"""What is found wrong with a checkpoint before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.base_model import build_on_meta
from lorakit.catalog import load_catalog
from lorakit.errors import UserError
from lorakit.progress import SilentProgress
from lorakit.weights.base import family_of, open_base
from lorakit.weights.stream import check_not_quantized, check_tensors, stream_weights


def changed(source: Path, target: Path, change: dict[str, Any], **config: Any) -> Path:
    """A copy with tensors replaced, added, or with None left out."""
    target.mkdir(exist_ok=True)
    values = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    tensors = {**load_file(source / "model.safetensors"), **change}
    save_file({n: t for n, t in tensors.items() if t is not None}, target / "model.safetensors")
    return target


def check(directory: Path) -> Any:
    catalog = load_catalog()
    opened = open_base(directory, catalog)
    family = family_of(opened.config, catalog, directory)
    check_not_quantized(opened)
    model = build_on_meta(family, opened.config, family.options(path=str(directory)))
    check_tensors(model, opened)
    return model, opened


def test_everything_at_once(checkpoint: Path, tmp_path: Path) -> None:
    directory = changed(
        checkpoint,
        tmp_path,
        {
            "model.norm.weight": None,
            "model.layers.0.mlp.up_proj.weight": torch.zeros(3, 4),
            "model.layers.1.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.int8),
            "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4),
            "vision.weight": torch.zeros(2),
        },
    )
    with pytest.raises(UserError) as error:
        check(directory)
    assert sorted(error.value.message.splitlines()[1:]) == [
        "  dtype: model.layers.1.mlp.up_proj.weight is stored as I8, a weight is floating-point",
        "  missing: model.norm.weight [32]",
        "  shape: model.layers.0.mlp.up_proj.weight is [3, 4], config.json says [48, 32]",
        "  unexpected: vision.weight [2]",
    ]


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            {"model.layers.0.mlp.up_proj.qweight": torch.zeros(2)},
            {},
            r"it stores .*up_proj.qweight",
        ),
        ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already \(gptq\)"),
        ({}, {"quantization_config": {"quant_method": "awq"}}, r"already \(awq\)"),
        (
            {"model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(2)},
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            r"already \(bitsandbytes\).*absmax",
        ),
    ],
)
def test_quantized_checkpoints(
    checkpoint: Path, change: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(changed(checkpoint, tmp_path, change, **config))
    assert "bf16 or fp16" in error.value.fix


@pytest.mark.parametrize("stored", ["both", "embedding", "head"])
def test_a_tied_pair_may_be_stored_under_either_name(
    checkpoint: Path, stored: str, tmp_path: Path
) -> None:
    embedding = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    change = {
        "model.embed_tokens.weight": None if stored == "head" else embedding,
        "lm_head.weight": None if stored == "embedding" else embedding.clone(),
    }
    model, opened = check(changed(checkpoint, tmp_path, change))
    stream_weights(
        model,
        opened,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=SilentProgress(),
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)


def test_weights_do_not_change_with_the_file(checkpoint: Path, tmp_path: Path) -> None:
    directory = changed(checkpoint, tmp_path, {})
    model, opened = check(directory)
    stream_weights(
        model,
        opened,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=SilentProgress(),
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    file = directory / "model.safetensors"
    with file.open("r+b") as written:
        written.seek(file.stat().st_size // 2)
        written.write(bytes(file.stat().st_size // 2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_stored_dtypes(checkpoint: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {n: t.to(dtype) for n, t in load_file(checkpoint / "model.safetensors").items()}
    model, opened = check(changed(checkpoint, tmp_path, tensors))
    stream_weights(
        model,
        opened,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=SilentProgress(),
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name].float())
