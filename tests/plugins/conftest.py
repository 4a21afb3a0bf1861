"""Environments and planted plugins."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lorakit.testing.environments import Environment, build_wheel, plant_plugin

ROOT = Path(__file__).resolve().parents[2]
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
def plant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
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
