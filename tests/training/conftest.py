"""Runs with a held-out evaluation, and signals in the middle of one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from lorakit import evaluation

# 21 rows in 11 micro-batches in windows of 3: 4 steps an epoch, the last window ragged.
SETTINGS = {
    "adapter": {"dropout": 0.2},
    "training": {"batch_size": 2, "gradient_accumulation_steps": 3, "epochs": 2},
}
STABLE = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "eval_loss")


@pytest.fixture
def eval_file(tmp_path, make_rows) -> Path:
    """Nine rows that the recipe's own do not hold, some of them longer than its longest."""
    file = tmp_path / "unseen.jsonl"
    rows = make_rows(9, seed=77, longest=24)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def evaluated_recipe(make_recipe, make_rows, eval_file):
    """A recipe; `evaluation` is over the file unless it says otherwise, and None leaves it out."""

    def recipe(*, evaluation=(), **changes) -> str:
        sections = {k: {**SETTINGS.get(k, {}), **v} for k, v in changes.items()}
        if evaluation is not None:
            rows = dict(evaluation)
            sections["evaluation"] = (
                rows if "fraction" in rows else {"path": str(eval_file), **rows}
            )
        return make_recipe(make_rows(21), **{**SETTINGS, **sections})

    return recipe


@pytest.fixture(scope="session")
def stable():
    """`stable(lines)`: what of a run's metrics is the same whenever it is repeated."""

    def stable(lines) -> list[dict[str, float]]:
        return [{key: line[key] for key in STABLE if key in line} for line in lines]

    return stable


@pytest.fixture
def signal_in_evaluation(monkeypatch):
    """Sends this process a signal in the n-th micro-batch of all evaluations; returns a list that
    gets an entry for each micro-batch."""
    seen: list[int] = []

    def arm(number: int, kind: int = signal.SIGINT) -> list[int]:
        real = evaluation.batch_loss

        def batch_loss(model, batch):
            seen.append(len(batch.tokens))
            if len(seen) == number:
                os.kill(os.getpid(), kind)
            return real(model, batch)

        monkeypatch.setattr(evaluation, "batch_loss", batch_loss)
        return seen

    yield arm
    monkeypatch.undo()
