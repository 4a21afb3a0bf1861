"""Peak resident memory while loading: the model as stored, the largest tensor, and 400 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = Path(__file__).with_name("measure_loading.py")
SLACK = 400e6
LARGE = {"model_type": "sample", "vocabulary": 32_000, "width": 2048, "inner": 6144, "layers": 18}
"""1.04 GB in bf16, as 7 shards; its largest tensor, the embedding, takes 262 MB in fp32."""
SMALL = {"model_type": "sample", "vocabulary": 8_000, "width": 1024, "inner": 3072, "layers": 16}
"""218 MB in bf16; its largest tensor takes 33 MB in fp32."""
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="measured with Linux's /proc"
)


def write_sharded(directory: Path, dtype: torch.dtype, config: dict[str, Any]) -> Path:
    """Random weights; no shard is ever in memory twice."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    width, inner, layers = config["width"], config["inner"], config["layers"]
    groups: list[dict[str, tuple[int, ...]]] = [
        {"embed_tokens.weight": (config["vocabulary"], width)}
    ]
    for first in range(0, layers, 3):
        groups.append({})
        for layer in range(first, min(first + 3, layers)):
            groups[-1] |= {
                f"layers.{layer}.up.weight": (inner, width),
                f"layers.{layer}.up.bias": (inner,),
                f"layers.{layer}.down.weight": (width, inner),
                f"layers.{layer}.down.bias": (width,),
            }
    weight_map = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({n: torch.rand(s).to(dtype) for n, s in group.items()}, directory / name)
        weight_map |= dict.fromkeys(group, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def load(directory: Path, kept: str, scheme: str, tune: str = "1") -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(directory), kept, scheme],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LORAKIT_TUNE": tune},
    )
    found: dict[str, int] = json.loads(done.stdout)
    print(found)
    return found


def largest(config: dict[str, Any]) -> int:
    return 4 * int(config["vocabulary"]) * int(config["width"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("small") / "model", torch.bfloat16, SMALL)


@pytest.mark.parametrize("kept", ["bfloat16", "float32"])
@pytest.mark.parametrize("scheme", ["none", "rows8"])
def test_loading_takes_the_model_and_one_tensor(small: Path, kept: str, scheme: str) -> None:
    found = load(small, kept, scheme)
    assert found["peak"] - found["before"] < found["model"] + largest(SMALL) + 60e6


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_gigabyte(stored: torch.dtype, tmp_path: Path) -> None:
    config = LARGE if stored == torch.bfloat16 else {**LARGE, "layers": 8}
    directory = write_sharded(tmp_path / "model", stored, config)
    assert sum(file.stat().st_size for file in directory.glob("*.safetensors")) >= 1e9
    for kept in ("float32", "bfloat16"):
        for scheme in ("none", "rows8"):
            found = load(directory, kept, scheme)
            assert found["peak"] < found["model"] + largest(LARGE) + SLACK, (kept, scheme)
    for file in directory.iterdir():
        file.unlink()
