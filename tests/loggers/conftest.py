"""What the loggers' tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.protocols import RunInfo
from lorakit.recipes import resolve_recipe

NUMBERS = (
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "tokens_per_second",
    "trained_tokens_per_second",
    "step_seconds",
    "data_seconds",
    "peak_memory_bytes",
)


@pytest.fixture
def numbers() -> tuple[str, ...]:
    """The names a line of metrics.jsonl has beside `step`."""
    return NUMBERS


@pytest.fixture
def run_info(make_recipe: Callable[..., str]) -> Callable[..., RunInfo]:
    """`run_info(first_step)`: what a logger is told before a session of one and the same run."""
    recipe = resolve_recipe(make_recipe(training={"epochs": 7}))

    def make(first_step: int = 0, output: Path | None = None) -> RunInfo:
        return RunInfo(
            "tiny", output or recipe.output, recipe, first_step, first_step + 3, 1_000, 100_000
        )

    return make
