"""Hugging Face directories of pytorch_model*.bin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.catalog import load_catalog
from lorakit.errors import UserError
from lorakit.protocols import BaseCheckpoint, TensorSpec
from lorakit.testing import check_weight_format
from lorakit.weights.base import open_base

STATE = {
    "a.weight": torch.rand(40, 30),
    "a.bias": torch.rand(40).bfloat16(),
    "turned.weight": torch.rand(6, 8).T,
    "part.weight": torch.rand(100)[10:20],
    "scalar": torch.tensor(2.0),
    "empty": torch.empty(0, 3),
}


def write(directory: Path, *files: dict[str, torch.Tensor], zipped: bool = True) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    names = ["pytorch_model.bin"]
    if len(files) > 1:
        names = [f"pytorch_model-{i:05d}-of-{len(files):05d}.bin" for i in range(1, len(files) + 1)]
        weight_map = {n: file for file, state in zip(names, files, strict=True) for n in state}
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name, state in zip(names, files, strict=True):
        torch.save(state, directory / name, _use_new_zipfile_serialization=zipped)
    return directory


def opened(directory: Path) -> BaseCheckpoint:
    return open_base(directory, load_catalog())


@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout(zipped: bool, tmp_path: Path) -> None:
    checkpoint = opened(write(tmp_path, STATE, zipped=zipped))
    found = dict(checkpoint.tensors())
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    specs = checkpoint.shards()["model.safetensors"]
    assert specs["a.bias"] == TensorSpec((40,), "BF16")
    assert {n: s.shape for n, s in specs.items()} == {n: tuple(t.shape) for n, t in STATE.items()}


def test_shards_and_shared_tensors(tmp_path: Path) -> None:
    shared = torch.rand(5, 4)
    first, second = {"embed": shared, "lm_head": shared}, {"x": torch.rand(3)}
    checkpoint = opened(write(tmp_path, first, second))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert list(checkpoint.shards()) == names
    assert [name for name, _ in checkpoint.tensors(names[1])] == ["x"]
    found = dict(checkpoint.tensors())
    assert torch.equal(found["embed"], shared)
    assert torch.equal(found["lm_head"], shared)


def test_the_same_model_as_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    write(tmp_path, model.state_dict())
    for file in checkpoint.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    form = next(f for f in load_catalog().all("weight format") if f.name == "torch")
    check_weight_format(form, tmp_path)
    theirs = dict(opened(checkpoint).tensors())
    ours = dict(opened(tmp_path).tensors())
    assert ours.keys() - theirs.keys() == {"lm_head.weight"}  # tied: transformers stores one
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_trains(checkpoint: Path, train_run: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    directory = tmp_path / "bin"
    write(directory, model.state_dict())
    for file in checkpoint.glob("*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    settings: dict[str, Any] = {
        "training": {"max_steps": 2},
        "checkpointer": {"name": "safetensors", "save_merged": True},
    }
    run = train_run(model=directory, **settings)
    other = train_run(model=checkpoint, **settings)
    ours = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert ours == (other / "adapter" / "adapter_model.safetensors").read_bytes()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(other / "merged").state_dict()
    assert all(torch.equal(merged[name], theirs[name]) for name in theirs)


def test_safetensors_come_first(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert "model.norm.weight" in dict(opened(tmp_path).tensors())


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write(tmp_path / "m", {"a": Harm()}, zipped=zipped)  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"could run code \(\w+\.mkdir\)") as error:
        opened(directory).shards()
    assert "\n" not in error.value.message
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable torch file"),
        (b"hello" * 100, "not a readable torch file|could run code"),
        (b"PK\x03\x04" + bytes(100), "not a readable torch file|could run code"),
    ],
)
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path, STATE)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        opened(tmp_path).shards()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(zipped: bool, tmp_path: Path) -> None:
    write(tmp_path, STATE, zipped=zipped)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(UserError, match="not a readable torch file"):
        list(opened(tmp_path).tensors())


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    write(tmp_path, {"model": {"a": torch.rand(2)}})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="not a state dict"):
        opened(tmp_path).shards()


def test_a_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.rand(2)}, {"b": torch.rand(2)})
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="1 of 2 weight files are missing"):
        opened(tmp_path).shards()
