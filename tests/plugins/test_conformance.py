"""Every installed plugin, and every sample plugin, passes the checks that ship with lorakit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli

from lorakit.catalog import load_catalog
from lorakit.testing import conformance_cases

HERE = Path(__file__).parent
CONFIGS = tomli.loads((HERE / "family_configs.toml").read_text(encoding="utf-8"))
LLAMA = {**CONFIGS["llama"], "vocab_size": 320}
ROWS: dict[str, dict[str, Any]] = {
    "dataset: messages": {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    },
    "dataset: alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "dataset: text": {"text": "Words."},
    "dataset: quiz": {"question": "?", "answer": "!"},
}
OFFLINE = {"logger: wandb": {"mode": "offline"}}


def lazily(make: Callable[[], Any], run: Callable[[Any], None]) -> Callable[[], None]:
    return lambda: run(make())


def installed_cases() -> list[Any]:
    samples: dict[str, Any] = dict(ROWS)
    samples |= {f"model family: {name}": config for name, config in CONFIGS.items()}
    samples["model source: local"] = str(HERE)
    cases = conformance_cases(load_catalog(), samples=samples, options=OFFLINE)
    return [pytest.param(case.check, id=case.id) for case in cases]


@pytest.mark.parametrize("check", installed_cases())
def test_installed_plugins_conform(check: Callable[[], None]):
    check()


def test_every_family_that_is_installed_has_a_sample():
    assert sorted(set(load_catalog().names("model family")) - set(CONFIGS)) == []


def test_safetensors_directories_conform(base_model: Path):
    from lorakit.testing import check_weight_format

    check_weight_format(load_catalog().get("weight format", "safetensors"), base_model)
