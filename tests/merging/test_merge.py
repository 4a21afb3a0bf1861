"""What `lorakit merge` keeps of the base, what it writes, and what it leaves behind if it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.catalog import load_catalog
from lorakit.cli import main
from lorakit.errors import UserError, disk_size
from lorakit.mergeable import merge_trained
from lorakit.merging import merge_adapter
from lorakit.progress import SilentProgress
from lorakit.protocols import TensorSpec
from lorakit.testing.checkpoints import MemoryCheckpoint
from lorakit.weights.base import open_base
from lorakit.weights.shard_plan import plan_shards
from lorakit.weights.shard_writer import ShardWriter

LORA = load_catalog().get("adapter", "lora")
OPTIONS = LORA.options(rank=2, alpha=4.0)
LAYER = "model.layers.1.mlp.up_proj"
INDEX = "model.safetensors.index.json"
IDS = [5, 300, 17, 17, 201, 9, 383, 0, 44, 120, 77]


def small_adapter(inputs=32, outputs=48):
    torch.manual_seed(3)
    parts = {"lora_A.weight": (2, inputs), "lora_B.weight": (outputs, 2)}
    return {LAYER: {name: torch.randn(shape) for name, shape in parts.items()}}


def fold(base, directory, tensors=None, **settings):
    merge_adapter(
        base,
        LORA,
        OPTIONS,
        tensors or small_adapter(),
        directory,
        files={},
        progress=SilentProgress(),
        **settings,
    )


@pytest.fixture
def base(make_checkpoint, tmp_path):
    """A sharded checkpoint in bf16, with files and metadata a model directory has."""
    directory = tmp_path / "base"
    shutil.copytree(make_checkpoint(max_shard_size="30KB"), directory)
    for file in directory.glob("*.safetensors"):
        tensors = {name: t.bfloat16() for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt", "made_by": "somebody"})
    (directory / "LICENSE").write_text("be kind")
    (directory / "README.md").write_text("# a model")
    (directory / "modeling_own.py").write_text("x = 1")
    (directory / "config.json").write_text(
        "\n" + (directory / "config.json").read_text()  # not as json.dumps writes it
    )
    return directory


def test_all_of_the_base_but_the_merged_weights_is_kept(base, tmp_path):
    merged = tmp_path / "merged"
    fold(open_base(base, load_catalog()), merged)
    assert {p.name for p in merged.iterdir()} == {p.name for p in base.iterdir()}
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            assert (merged / file.name).read_bytes() == file.read_bytes(), file.name
            continue
        with safe_open(file, "pt") as old, safe_open(merged / file.name, "pt") as new:
            assert new.metadata() == old.metadata()
            assert set(new.keys()) == set(old.keys())
            for name in old.keys():  # noqa: SIM118
                before, after = old.get_tensor(name), new.get_tensor(name)
                assert after.dtype == before.dtype == torch.bfloat16
                assert after.equal(before) == (name != f"{LAYER}.weight")


def test_a_merged_weight_is_rounded_once_from_fp32(base, tmp_path):
    fold(open_base(base, load_catalog()), tmp_path / "merged")
    shard = json.loads((base / INDEX).read_text())["weight_map"][f"{LAYER}.weight"]
    stored = load_file(base / shard)[f"{LAYER}.weight"]
    found = load_file(tmp_path / "merged" / shard)[f"{LAYER}.weight"]
    a, b = (small_adapter()[LAYER][f"lora_{x}.weight"].double() for x in "AB")
    exact = stored.double() + 2 * b @ a
    # Half a unit in the last of bf16's eight bits, and the error of fp32.
    assert ((found.double() - exact).abs() <= exact.abs() * (2**-8 * 0.5001) * 2).all()
    nearest = exact.float().bfloat16()
    assert (found == nearest).float().mean() > 0.999


def test_what_stands_for_the_base_weights_is_what_is_merged(base, tmp_path):
    """The seam for adapters trained on quantized weights."""
    seen = []

    def coarse(name, tensor):
        seen.append(name)
        return tensor.float().mul(4).round() / 4

    opened = open_base(base, load_catalog())
    fold(opened, tmp_path / "merged", base_weight=coarse)
    stored = dict(opened.tensors())
    assert sorted(seen) == sorted(stored)
    a, b = (small_adapter()[LAYER][f"lora_{x}.weight"] for x in "AB")
    for name, tensor in open_base(tmp_path / "merged", load_catalog()).tensors():
        expected = coarse(name, stored[name])
        if name == f"{LAYER}.weight":
            expected = expected + 2 * b @ a
        torch.testing.assert_close(tensor, expected.bfloat16(), atol=0, rtol=2**-7)


def test_one_file_of_another_name_keeps_it_and_its_index(make_checkpoint, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_checkpoint(), base)
    (base / "model.safetensors").rename(base / "weights.safetensors")
    names = load_file(base / "weights.safetensors")
    weight_map = dict.fromkeys(names, "weights.safetensors")
    index = json.dumps({"weight_map": weight_map, "metadata": {"total_size": 1}})
    (base / INDEX).write_text(index)
    fold(open_base(base, load_catalog()), tmp_path / "merged")
    assert (tmp_path / "merged" / INDEX).read_text() == index
    assert (tmp_path / "merged" / "weights.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.fixture
def memory_base(make_checkpoint):
    """A base that is no safetensors file: what GGUF and pickled checkpoints come as."""
    directory = make_checkpoint()
    config = json.loads((directory / "config.json").read_text())
    return MemoryCheckpoint(config, load_file(directory / "model.safetensors"))


def test_a_base_of_another_format_becomes_one_file(memory_base, tmp_path):
    merged = tmp_path / "merged"
    fold(memory_base, merged)
    assert {p.name for p in merged.iterdir()} == {"model.safetensors", "config.json"}
    found = load_file(merged / "model.safetensors")
    assert found.keys() == memory_base.contents.keys()
    changed = {n for n, t in memory_base.contents.items() if not t.equal(found[n])}
    assert changed == {f"{LAYER}.weight"}
    AutoModelForCausalLM.from_pretrained(merged)


def test_a_large_base_of_another_format_becomes_shards(memory_base, tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.weights.shard_plan.plan_shards.__defaults__", (30_000,))
    merged = tmp_path / "merged"
    fold(memory_base, merged)
    files = sorted(p.name for p in merged.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((merged / INDEX).read_text())
    contents = {file: load_file(merged / file) for file in files}
    assert index["weight_map"] == {n: f for f, tensors in contents.items() for n in tensors}
    sizes = {f: sum(t.nbytes for t in tensors.values()) for f, tensors in contents.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    # Over the limit is only what is one tensor.
    assert all(s <= 30_000 or len(contents[f]) == 1 for f, s in sizes.items())
    fold(memory_base, tmp_path / "again", base_weight=lambda _, tensor: tensor)
    one, two = (
        AutoModelForCausalLM.from_pretrained(p)(torch.tensor([IDS])).logits
        for p in (merged, tmp_path / "again")
    )
    assert torch.equal(one, two)


def test_dtypes_that_safetensors_lacks_are_written_in_fp32(memory_base, monkeypatch):
    specs = {"a": TensorSpec((2, 3), "Q4_1"), "b": TensorSpec((3,), "F16")}
    monkeypatch.setattr(MemoryCheckpoint, "shards", lambda _: {"x.gguf": specs})
    (planned,) = plan_shards(memory_base).values()
    assert {n: s.dtype for n, s in planned.items()} == {"a": "F32", "b": "F16"}


def test_a_weight_stored_in_8_bits_is_refused(memory_base, monkeypatch, tmp_path):
    specs = {f"{LAYER}.weight": TensorSpec((48, 32), "F8_E4M3")}
    monkeypatch.setattr(MemoryCheckpoint, "shards", lambda _: {"x": specs})
    with pytest.raises(UserError, match=rf"{LAYER}\.weight is stored as F8_E4M3"):
        fold(memory_base, tmp_path / "merged")


@pytest.fixture
def adapter(train_run):
    return train_run() / "adapter"


def test_a_full_disk_is_told_before_anything_is_written(adapter, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(SystemExit) as exited:
        main(["merge", str(adapter), "--output", str(tmp_path / "out")])
    assert exited.value.code == 2
    said = capsys.readouterr().err
    assert "the merged model takes 111.2 kB, the disk has 1.0 kB left" in said
    assert "Traceback" not in said
    assert not any("out" in p.name for p in tmp_path.iterdir())


def test_a_disk_without_room_for_merged_is_told_before_training(
    make_recipe, tmp_path, monkeypatch, capsys
):
    reference = make_recipe(checkpointer={"save_merged": True})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    output = tmp_path / "out"
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as exited:
            main(["train", reference, "--output", str(output), *more])
        assert exited.value.code == 2
        said = capsys.readouterr().err
        assert f"{output / 'merged'}: the merged model takes 111.2 kB" in said
        assert "checkpointer.save_merged = false" in said
        assert not output.exists()
    with pytest.raises(SystemExit) as exited:
        main(["train", reference, "--set", "checkpointer.save_merged=false"])
    assert exited.value.code == 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (12_345, "12.3 kB"),
        (269_060_552, "269.1 MB"),
        (13_476_839_424, "13.5 GB"),
        (1_200_000_000_000, "1,200.0 GB"),
    ],
)
def test_sizes_have_a_unit_that_fits(size, text):
    assert disk_size(size) == text


def test_a_disk_that_fills_up_leaves_nothing(adapter, tmp_path, monkeypatch, capsys):
    wrote = []
    original = ShardWriter.write

    def write(self, name, tensor):
        wrote.append(name)
        if len(wrote) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", write)
    with pytest.raises(SystemExit) as exited:
        main(["merge", str(adapter), "--output", str(tmp_path / "out")])
    assert exited.value.code == 1
    said = capsys.readouterr().err
    assert "could not be written" in said
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert len(wrote) == 5
    assert not any("out" in p.name for p in tmp_path.iterdir())


def test_an_interrupted_merge_leaves_what_was_there(adapter, tmp_path, monkeypatch, base):
    out = tmp_path / "out"
    out.mkdir()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_trained(str(adapter), out)
    assert list(out.iterdir()) == []
    (out / "older").write_text("kept")
    with pytest.raises(KeyboardInterrupt):
        fold(open_base(base, load_catalog()), out, replace=True)
    assert [p.name for p in out.iterdir()] == ["older"]
    assert not any(p.name.startswith(".out") for p in tmp_path.iterdir())


def test_an_output_that_cannot_be_made_is_one_message(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out cannot be made: .*file is a file"):
        merge_trained(str(adapter), tmp_path / "file" / "out")


def test_pickled_shards_become_safetensors(make_checkpoint, tmp_path):
    source = make_checkpoint(tie_word_embeddings=False)
    base = tmp_path / "base"
    shutil.copytree(source, base)
    (base / "model.safetensors").unlink()
    (base / "LICENSE").write_text("be kind")
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, base / file)
        weight_map |= dict.fromkeys(part, file)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    merged = tmp_path / "merged"
    fold(open_base(base, load_catalog()), merged)
    kept = {p.name for p in source.iterdir()} | {"LICENSE"}
    assert {p.name for p in merged.iterdir()} == kept
    fold(open_base(source, load_catalog()), tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    found = load_file(merged / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    AutoModelForCausalLM.from_pretrained(merged)
