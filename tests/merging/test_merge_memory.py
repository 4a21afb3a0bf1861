"""Merging needs memory for a few tensors, whatever the size of the model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def measured(*arguments: object) -> dict[str, float]:
    """In GB, of the command as its users run it: in a tuned process, as tests' own is not."""
    command = [sys.executable, "-m", "tests.bench.merge_memory", *map(str, arguments)]
    env = {**os.environ, "LORAKIT_TUNE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {k.strip(): float(v) for k, v in re.findall(r"(?m)^(\D+?) +([\d.]+) GB", done.stdout)}


@pytest.mark.slow
def test_peak_is_no_more_than_the_largest_shard_beside_the_interpreter(tmp_path):
    found = measured("--gigabytes", 0.3, "--shard-gigabytes", 0.15, "--folder", tmp_path)
    assert found["model"] > 0.25
    assert found["largest shard"] > 0.1
    beyond = found["peak"] - found["interpreter"]
    # 50 MB for what does not grow with the shards: the adapter, a tensor in fp32.
    assert beyond < 1.5 * found["largest shard"] + 0.05


@pytest.mark.slow
def test_comparing_the_merges_of_a_quantized_base_does_not_hold_the_model(tmp_path):
    sizes = ("--gigabytes", 1.2, "--shard-gigabytes", 0.3)
    found = measured(*sizes, "--folder", tmp_path, "--quantized")
    assert found["model"] > 1.1
    assert found["peak"] - found["interpreter"] < 0.5 * found["model"]
