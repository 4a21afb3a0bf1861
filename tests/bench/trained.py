"""Runs of lorakit and of its peers: each gives steps, losses and peak memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
from attrs import evolve, field, frozen

from tests.bench.inputs import Inputs
from tests.bench.processes import ROOT, RunFailed, run

PEERS = Path(__file__).with_name("peers")


@frozen(kw_only=True)
class Setting:
    """How lorakit is to train.

    Attributes:
        data: Keys of the recipe's section, beside the benchmark's own.
        training: Likewise.
        adapter: Likewise.
        precision: Likewise.
        quantization: None for none.
        env: Environment variables.
        without: A technique to leave out, see `tests.bench.without`.
    """

    data: Mapping[str, Any] = field(factory=dict)
    training: Mapping[str, Any] = field(factory=dict)
    adapter: Mapping[str, Any] = field(factory=dict)
    precision: Mapping[str, Any] = field(factory=dict)
    quantization: str | None = None
    env: Mapping[str, str] = field(factory=dict)
    without: str | None = None

    def but(self, **sections: Any) -> Setting:
        """This one with keys changed."""
        merged = {
            name: {**getattr(self, name), **value} if isinstance(value, dict) else value
            for name, value in sections.items()
        }
        return evolve(self, **merged)


def packed(tokens: int, checkpointing: bool | str = False) -> Setting:
    """One row of so many tokens a step, filled with whole documents."""
    return Setting(
        data={"packed": True, "max_seq_len": tokens},
        training={"batch_size": 1, "activation_checkpointing": checkpointing},
    )


def recipe(setting: Setting, model: Path, rows: Path, steps: int) -> dict[str, Any]:
    """The table that all lorakit runs share, with the setting's keys."""
    table: dict[str, Any] = {
        "output": "run",
        "model": {"name": "llama", "path": str(model)},
        "adapter": {"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
        "optimizer": {"name": "adamw", "lr": 3e-4},
        "schedule": {"name": "constant"},
        "precision": {"name": "fp32", "storage": "checkpoint"},
        "data": {"name": "messages", "path": str(rows), "max_seq_len": 1024, "shuffle": False},
        "training": {"max_steps": steps},
        "checkpointer": {"name": "safetensors", "save_merged": False},
        "loggers": [{"name": "disk"}],
    }
    for name in ("data", "training", "adapter", "precision"):
        table[name] |= getattr(setting, name)
    if setting.quantization:
        table["quantization"] = {"name": setting.quantization}
    return table


def write_recipe(directory: Path, table: Mapping[str, Any]) -> str:
    """-> what `lorakit train` takes."""
    file = directory / "recipe.toml"
    file.write_text(tomli_w.dumps({"bench": table}), encoding="utf-8")
    return f"{file}:bench"


def train_lorakit(setting: Setting, inputs: Inputs, *, rows: Path, steps: int) -> dict[str, Any]:
    """`lorakit train` for so many steps."""
    with tempfile.TemporaryDirectory() as name:
        wanted = write_recipe(Path(name), recipe(setting, inputs.model, rows, steps))
        module = ["lorakit", "train"]
        if setting.without:
            module = ["tests.bench.without", setting.without]
        output = Path(name, "run")
        command = [sys.executable, "-m", *module, wanted, "--output", str(output)]
        done = run(command, env=setting.env)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    return {
        "steps": [
            {
                "seconds": line["step_seconds"],
                "tokens": line["tokens"],
                "trained_tokens": line["trained_tokens"],
            }
            for line in lines
        ],
        "losses": [line["loss"] for line in lines],
        "peak_bytes": done.peak_bytes,
    }


def train_in_turn(
    settings: Sequence[Setting], inputs: Inputs, *, rows: Path, steps: int
) -> list[dict[str, Any]]:
    """So many steps of each setting, one of each after the other, in one process."""
    with tempfile.TemporaryDirectory() as name:
        wanted = []
        for index, setting in enumerate(settings):
            directory = Path(name, str(index))
            directory.mkdir()
            table = recipe(setting, inputs.model, rows, steps)
            wanted.append(write_recipe(directory, table))
        done = run([sys.executable, "-m", "tests.bench.in_turn", *wanted])
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def train_peer(
    script: str, inputs: Inputs, *, steps: int, options: Sequence[str]
) -> dict[str, Any]:
    """A script of `peers/` in the peers' environment."""
    command = [str(inputs.peers_python), str(PEERS / script), "--model", str(inputs.model)]
    # Without the hub: some libraries look for newer versions of what is there.
    env = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = run([*command, "--steps", str(steps), *options], env=env)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    # Both sides are measured in the same way, from outside.
    return result | {"peak_bytes": done.peak_bytes}


def matmul_limit(setting: Setting, inputs: Inputs, *, rows: Path, steps: int) -> dict[str, Any]:
    """The matrix products alone of the steps that `train_lorakit` makes."""
    with tempfile.TemporaryDirectory() as name:
        wanted = write_recipe(Path(name), recipe(setting, inputs.model, rows, steps))
        done = run([sys.executable, "-m", "tests.bench.matmul_limit", wanted])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def startup_seconds(setting: Setting, inputs: Inputs, *, rows: Path) -> float:
    """From the command to the start of its first step: when that step was logged, less what it
    took."""
    with tempfile.TemporaryDirectory() as name:
        wanted = write_recipe(Path(name), recipe(setting, inputs.model, rows, 1))
        metrics = Path(name, "run", "metrics.jsonl")
        command = [
            sys.executable,
            "-m",
            "lorakit",
            "train",
            wanted,
            "--output",
            str(metrics.parent),
        ]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while not (metrics.exists() and metrics.read_text().endswith("\n")):
                if process.poll() is not None:
                    raise RunFailed(f"exit status {process.returncode} before the first step")
                time.sleep(0.005)
            logged = time.perf_counter() - started
            first: float = json.loads(metrics.read_text().splitlines()[0])["step_seconds"]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return logged - first
