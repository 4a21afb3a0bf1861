"""Writing a Hugging Face directory: safetensors by lorakit, read back by safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lorakit.protocols import TensorSpec
from lorakit_gguf.checkpoint import GGUFCheckpoint
from lorakit_gguf.convert import write_directory


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_file(tiny: Any, dtype: torch.dtype, progress: Any, tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint.open(tiny.write(tmp_path / "m.gguf", "F16"))
    (directory := tmp_path / "out").mkdir()
    write_directory(checkpoint, directory, progress, dtype=dtype)
    names = [path.name for path in sorted(directory.iterdir())]
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((directory / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert config == {**checkpoint.config, "torch_dtype": name}
    found = read_all(directory)
    assert found.keys() == tiny.tensors.keys()
    for key, tensor in checkpoint.tensors():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], tensor.to(dtype))
    (task,) = progress.tasks
    assert (task.total, task.done, task.unit) == (len(found), len(found), "tensors")


def test_several_files(tiny: Any, progress: Any, tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint.open(tiny.write(tmp_path / "m.gguf"))
    (directory := tmp_path / "out").mkdir()
    write_directory(checkpoint, directory, progress, most_shard_bytes=100_000)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((directory / name).stat().st_size < 110_000 for name in files)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    found = read_all(directory)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for name, tensor in checkpoint.tensors():
        assert torch.equal(found[name], tensor)
        with safe_open(directory / index["weight_map"][name], framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118

    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(directory)
    for name, tensor in checkpoint.tensors():
        assert torch.equal(model.state_dict()[name], tensor)


class Shuffled:
    """A checkpoint whose tensors come in another order than its headers."""

    path = Path("shuffled")
    config = {"model_type": "test"}  # noqa: RUF012
    missing = 0

    def files(self) -> dict[str, bytes]:
        return {}

    def shards(self) -> dict[str, dict[str, TensorSpec]]:
        specs = {f"t{i}": TensorSpec((i + 1, 3), "F32") for i in range(4)}
        return {"model.safetensors": {**specs, "scalar": TensorSpec((), "F32")}}

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        yield "scalar", torch.tensor(7.0)
        for i in reversed(range(self.missing, 4)):
            yield f"t{i}", torch.full((3, i + 1), float(i)).T


def test_any_order_any_layout(progress: Any, tmp_path: Path) -> None:
    write_directory(Shuffled(), tmp_path, progress)
    found = read_all(tmp_path)
    assert found["scalar"] == 7.0
    for i in range(4):
        assert torch.equal(found[f"t{i}"], torch.full((i + 1, 3), float(i)))


def test_a_checkpoint_that_gives_less_than_it_announces(progress: Any, tmp_path: Path) -> None:
    checkpoint = Shuffled()
    checkpoint.missing = 1
    with pytest.raises(ValueError, match=r"never written: \['t0'\]"):
        write_directory(checkpoint, tmp_path, progress)
