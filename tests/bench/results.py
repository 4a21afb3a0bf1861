"""The results file: what was measured, in which sitting, on what."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tests.bench.processes import ROOT

FILE = ROOT / "docs" / "performance" / "results.json"
WARM_UP = 1
"""Steps at a run's start that do not count."""


def load(path: Path = FILE) -> dict[str, Any]:
    if not path.exists():
        return {"sittings": {}, "runs": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def save(results: Mapping[str, Any], path: Path = FILE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.rename(path)


def sitting(steps: int, peers_python: Path | None) -> dict[str, Any]:
    """Date, machine and versions, for the runs of a part."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip() or "unknown",
        "steps": steps,
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **(peer_versions(peers_python) if peers_python else {}),
        },
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peer_versions(python: Path) -> dict[str, str]:
    program = (
        "import json; from importlib.metadata import version as v; "
        "names = ('trl', 'peft', 'transformers', 'bitsandbytes'); "
        "print(json.dumps({**{n: v(n) for n in names}, 'torch (peers)': v('torch')}))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def pooled(run: Mapping[str, Any], again: Mapping[str, Any]) -> dict[str, Any]:
    """Two runs of one thing: the counted steps of both, and the higher peak; of a run that failed,
    nothing."""
    if "failed" in run or "failed" in again:
        return dict(again if "failed" in run else run)
    counted = again["steps"][WARM_UP:]
    peak = max(run["peak_bytes"], again["peak_bytes"])
    return {**run, "steps": [*run["steps"], *counted], "peak_bytes": peak}


# ---------------------------------------------------------------- figures of a run


def rates(run: Mapping[str, Any]) -> list[float]:
    """Tokens per second of each counted step."""
    steps = run["steps"]
    counted = steps[WARM_UP:] or steps
    return [step["tokens"] / step["seconds"] for step in counted]


def tokens_per_second(run: Mapping[str, Any]) -> float:
    return statistics.median(rates(run))


def step_tokens(run: Mapping[str, Any]) -> float:
    return statistics.median(step["tokens"] for step in run["steps"][WARM_UP:] or run["steps"])


def trained_share(run: Mapping[str, Any]) -> float:
    tokens = sum(step["tokens"] for step in run["steps"])
    return float(sum(step["trained_tokens"] for step in run["steps"]) / tokens)


def succeeded(results: Mapping[str, Any], name: str) -> bool:
    return "steps" in results["runs"].get(name, {})
