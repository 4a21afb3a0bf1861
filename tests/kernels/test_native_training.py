"""A run on lorakit-x86: the same losses as on torch, repeated bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.records import KernelLibrary
from lorakit.testing import write_checkpoint
from lorakit.testing.kernels import check_kernels

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    file = write_checkpoint("llama", CONFIG, tmp_path / "model") / "model.safetensors"
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(narrow, file, metadata={"format": "pt"})
    chats = [((f"{n} " * 90, "user"), ("no " * 80, "assistant")) for n in range(8)]
    rows = [{"messages": [{"role": role, "content": text} for text, role in c]} for c in chats]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "recipes.toml").write_text(
        f"""
        [small]
        output = "{tmp_path}/run"
        model = {{name = "llama", path = "{tmp_path}/model"}}
        data = {{name = "messages", path = "{tmp_path}/rows.jsonl"}}
        precision = {{name = "fp32"}}
        training = {{epochs = 2, batch_size = 2}}
        checkpointer = {{save_merged = false}}
        """,
        encoding="utf-8",
    )
    return f"{tmp_path}/recipes.toml:small"


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


CHANGES = {
    "fp32": {},
    "stored in bf16": {"precision.storage": "checkpoint"},
    "selective": {"training.activation_checkpointing": "selective"},
    "nf4": {"quantization.name": "nf4"},
    "DoRA": {"adapter.dora": True},
    "a larger rank": {"adapter.rank": 70},
}


def test_conformance(library: KernelLibrary) -> None:
    check_kernels(library)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_the_same_losses_as_on_torch(
    library: KernelLibrary, recipe: str, tmp_path: Path, changes: dict[str, object]
) -> None:
    runs = {}
    for name, kernels in (("torch", "torch"), ("ours", library.name), ("again", library.name)):
        overrides = {"training.kernels": kernels, **changes}
        runs[name] = lorakit.train(recipe, overrides=overrides, output=tmp_path / name).output
    assert losses(runs["ours"]) == pytest.approx(losses(runs["torch"]), rel=1e-5)
    assert losses(runs["ours"]) == losses(runs["again"])
    weights = [(runs[name] / "adapter" / "adapter_model.safetensors") for name in runs]
    assert weights[1].read_bytes() == weights[2].read_bytes()
    # Rounded otherwise somewhere: the kernels have been at work.
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_what_cannot_be_built_is_told() -> None:
    """Without a compiler the plugin is there all the same, and says why it cannot be used."""
    pytest.importorskip("lorakit_x86")
    code = (
        "import sys; sys.modules['lorakit_x86._kernels'] = None\n"
        "import lorakit_x86; print(lorakit_x86.unusable(0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "not built, for want of a C compiler" in done.stdout


@pytest.mark.usefixtures("library")
def test_threads_of_torchs_own() -> None:
    from lorakit_x86.arguments import threads

    count, parallel = threads()
    if parallel == 0:
        pytest.skip("this torch has another OpenMP library")
    assert count == torch.get_num_threads()
