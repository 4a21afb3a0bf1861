"""Tiny models of every family, by transformers and by lorakit, and the table of their parity."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest

PARITY: dict[tuple[str, str, str], dict[str, float]] = {}
"""(family, case, reference) -> what was measured; `pytest tests/models` prints it."""


class Pair(NamedTuple):
    """The same weights, in transformers' model and in lorakit's."""

    reference: Any
    model: Any


@pytest.fixture(scope="session")
def build_pair(randomize_weights: Callable[..., None]) -> Callable[..., Pair]:
    """`build_pair(config, written="published" | "transformers")`: lorakit reads the config.json
    as it is, or as transformers writes it today."""

    def build(config: Mapping[str, Any], *, written: str = "published", seed: int = 0) -> Pair:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        parsed = AutoConfig.for_model(**copy.deepcopy(dict(config)))
        # SDPA knows no soft-cap, and eager attention is right for all.
        reference = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager")
        randomize_weights(reference, seed)
        source = json.loads(parsed.to_json_string()) if written == "transformers" else config
        return Pair(reference.float().eval(), load_lorakit(source, reference.state_dict()))

    return build


def load_lorakit(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """The family that owns the config builds it; names and shapes are checked, weights stream."""
    import torch

    from lorakit.catalog import load_catalog
    from lorakit.progress import SilentProgress
    from lorakit.testing.checkpoints import MemoryCheckpoint, meta_model
    from lorakit.weights.base import family_of
    from lorakit.weights.stream import check_tensors, stream_weights

    checkpoint = MemoryCheckpoint(config, {k: v.clone() for k, v in tensors.items()})
    model = meta_model(family_of(config, load_catalog(), checkpoint.path), config)
    check_tensors(model, checkpoint)
    stream_weights(
        model,
        checkpoint,
        device=torch.device("cpu"),
        dtype=next(iter(tensors.values())).dtype,
        progress=SilentProgress(),
    )
    return model.eval()


@pytest.fixture(scope="session")
def build_lorakit() -> Callable[..., Any]:
    return load_lorakit


@pytest.fixture(scope="session")
def parity() -> Callable[..., None]:
    """`parity(family, case, reference, logits=0.0)` adds to the table."""

    def add(family: str, case: str, reference: str, **measured: float) -> None:
        PARITY.setdefault((family, case, reference), {}).update(measured)

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not PARITY:
        return
    terminalreporter.section("parity with transformers and PEFT, fp32")
    form = "{:<12}{:<34}{:<22}{:>14}{:>18}"
    terminalreporter.line(
        form.format("model_type", "case", "reference", "logits (abs)", "LoRA grads (rel)")
    )
    for (family, case, reference), measured in sorted(PARITY.items()):
        numbers = [measured.get(key) for key in ("logits", "gradients")]
        shown = ["" if number is None else f"{number:.1e}" for number in numbers]
        terminalreporter.line(form.format(family, case, reference, *shown))
