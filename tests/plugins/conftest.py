"""Environments and planted plugins."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from lorakit.testing import write_checkpoint
from lorakit.testing.environments import Environment, build_wheel, plant_plugin

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = Path(__file__).with_name("samples")
TOY = ROOT / "docs" / "examples" / "lorakit-toy"
TOY_CONFIG = {
    "model_type": "toy",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A fresh environment with lorakit and the plugins that are installed here."""
    return Environment.create(tmp_path / "environment")


@pytest.fixture(scope="session")
def toy_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(TOY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def toy_environment(tmp_path_factory: pytest.TempPathFactory, toy_wheel: Path) -> Environment:
    """An environment with the outside plugin's wheel, a checkpoint `model`, and recipes.toml."""
    made = Environment.create(tmp_path_factory.mktemp("toy") / "environment")
    made.install(toy_wheel)
    script = (
        "from lorakit.testing import write_checkpoint\n"
        f"write_checkpoint('toy', {TOY_CONFIG!r}, 'model')\n"
    )
    done = made.run("python", "-c", script)
    assert done.returncode == 0, done.stderr
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "no"}]}
        for n in range(8)
    ]
    (made.path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = (
        '[toy]\noutput = "run"\nmodel = {name = "toy", path = "model"}\n'
        'data = {name = "messages", path = "data.jsonl"}\n'
        "optimizer = {name = 'adamw', lr = 1e-2}\nschedule = {name = 'constant'}\n"
        "training = {epochs = 4, batch_size = 4}\n"
    )
    (made.path / "recipes.toml").write_text(recipe, encoding="utf-8")
    return made


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`plant(distribution, source)` makes a plugin importable, with its entry point, in this
    process, until the test ends."""
    folder = tmp_path / "planted"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    planted: list[str] = []

    def plant(distribution: str, source: str, **settings: str) -> str:
        module = plant_plugin(folder, distribution, source, **settings)
        importlib.invalidate_caches()
        planted.append(module)
        return module

    yield plant
    for module in planted:
        sys.modules.pop(module, None)


LLAMA_CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a byte tokenizer: do not write to it."""
    return write_checkpoint("llama", LLAMA_CONFIG, tmp_path_factory.mktemp("base"))


@pytest.fixture
def plant_sample(plant: Callable[..., str]) -> Callable[[str], str]:
    """Plants the plugin of samples/NAME.py as `lorakit-sample-NAME`."""

    def plant_sample(name: str) -> str:
        source = (SAMPLES / f"{name}.py").read_text(encoding="utf-8")
        return plant(f"lorakit-sample-{name.replace('_', '-')}", source)

    return plant_sample


@pytest.fixture
def small_recipe(tmp_path: Path, base_model: Path) -> Callable[..., str]:
    """`small_recipe(adapter={...}, ...)` writes a recipe of a few steps; its reference."""
    rows = [
        {"question": f"{n} or {n + 1}?", "answer": "both" if n % 2 else "neither"} for n in range(8)
    ]
    turns = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows
    ]
    data, quiz = tmp_path / "data.jsonl", tmp_path / "quiz.jsonl"
    data.write_text("\n".join(map(json.dumps, turns)), encoding="utf-8")
    quiz.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def write(**sections: Any) -> str:
        table = {
            "output": str(tmp_path / "run"),
            "device": "cpu",
            "model": {"name": "llama", "path": str(base_model)},
            "data": {"name": "messages", "path": str(data)},
            "optimizer": {"name": "adamw", "lr": 1e-2},
            "schedule": {"name": "constant"},
            "training": {"epochs": 3, "batch_size": 4},
            "checkpointer": {"name": "safetensors", "save_merged": False},
            "loggers": [{"name": "disk"}],
            **sections,
        }
        file = tmp_path / "recipes.toml"
        file.write_text(tomli_w.dumps({"small": table}), encoding="utf-8")
        return f"{file}:small"

    return write


@pytest.fixture
def losses() -> Callable[[Path], list[float]]:
    """The loss of each step of a run."""

    def losses(run: Path) -> list[float]:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    return losses
