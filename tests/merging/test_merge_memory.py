"""Merging needs memory for a few tensors, whatever the size of the model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "bench" / "merge_memory.py"


def test_peak_is_no_more_than_the_largest_shard_beside_the_interpreter(tmp_path):
    sizes = ["--gigabytes", "0.3", "--shard-gigabytes", "0.15", "--folder", str(tmp_path)]
    command = [sys.executable, BENCH, *sizes]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {k.strip(): float(v) for k, v in re.findall(r"(?m)^(\D+?) +([\d.]+) GB", done.stdout)}
    assert found["model"] > 0.25
    assert found["largest shard"] > 0.1
    beyond = found["peak"] - found["interpreter"]
    # 50 MB for what does not grow with the shards: the adapter, a tensor in fp32.
    assert beyond < 1.5 * found["largest shard"] + 0.05
