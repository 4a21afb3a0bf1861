"""Conformance of what a run leaves behind: checkpointers and loggers."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve

from lorakit.catalog import load_catalog
from lorakit.errors import UserError
from lorakit.options import (
    CheckpointerOptions,
    DataOptions,
    ModelOptions,
    SampleOptions,
    ScheduleOptions,
    TrainingOptions,
)
from lorakit.protocols import RunInfo, Snapshot, Text
from lorakit.recipes import Recipe, RunOptions, Section
from lorakit.records import CheckpointerType, DatasetFormat, LoggerType, ModelFamily
from lorakit.testing.failure import ensure
from lorakit.testing.offers import check_offer, make_options


def check_checkpointer(record: CheckpointerType, options: Mapping[str, Any] | None = None) -> None:
    """Checks a checkpointer in a temporary run directory.

    Args:
        record: The checkpointer.
        options: Keys of `[checkpointer]`, in place of the defaults.

    Raises:
        ConformanceError: Something does not hold.
    """
    check_offer(record)
    ensure(
        issubclass(record.options, CheckpointerOptions),
        "options do not extend CheckpointerOptions",
    )
    with tempfile.TemporaryDirectory() as folder:
        keep_all = make_options(record, {**(options or {}), "keep_last": 0})
        _check_store(record, keep_all, Path(folder) / "all")
        keep_two = make_options(record, {**(options or {}), "keep_last": 2})
        store = record.open(Path(folder) / "two", keep_two)
        for step in (1, 2, 10):
            store.save(sample_snapshot(step))
        ensure(store.steps() == [2, 10], f"keep_last 2 of 1, 2, 10 keeps {store.steps()}")
        store.save(evolve(sample_snapshot(11), kept_steps=(2,)))
        ensure(store.steps() == [2, 10, 11], f"kept_steps 2 of 2, 10, 11 keeps {store.steps()}")
        store.save(sample_snapshot(12))
        ensure(store.steps() == [11, 12], f"once no step is to be kept, it keeps {store.steps()}")


def _check_store(record: CheckpointerType, options: Any, directory: Path) -> None:
    store = record.open(directory, options)
    ensure(store.steps() == [], "steps: a new run has some already")
    for step in (9, 10, 100):
        store.save(sample_snapshot(step))
    ensure(store.steps() == [9, 10, 100], f"steps: saved 9, 10 and 100, found {store.steps()}")
    again = record.open(directory, options)
    ensure(again.steps() == [9, 10, 100], "steps: opened anew, it finds others")
    for step in (9, 100):
        _check_same(again.load(step), sample_snapshot(step))

    broken = sample_snapshot(101, state={"train": object()})
    # Any error will do: it stands for a disk that is full, or a kill.
    with contextlib.suppress(Exception):
        store.save(broken)
    ensure(store.steps() == [9, 10, 100], "steps: lists a snapshot whose save failed")
    store.save(sample_snapshot(100, seed=1))
    _check_same(store.load(100), sample_snapshot(100, seed=1))
    _check_damage(record, options, directory, store.save(sample_snapshot(102)))


def _check_damage(record: CheckpointerType, options: Any, directory: Path, place: Path) -> None:
    """With any one of its files gone, a snapshot is not listed, or loading it is a `UserError`."""
    files = [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else []
    unlisted = 0
    for file in files:
        kept = directory.with_name("kept")
        shutil.copytree(directory, kept)
        file.unlink()
        store = record.open(directory, options)
        if 102 in store.steps():
            try:
                store.load(102)
            except UserError:
                pass
            else:
                ensure(False, f"load: gives a snapshot whose {file.name} is missing")
        else:
            unlisted += 1
        shutil.rmtree(directory)
        kept.rename(directory)
    ensure(not files or unlisted, "steps: no file is the manifest; an incomplete one is listed")


def sample_snapshot(
    step: int, *, seed: int = 0, state: Mapping[str, Any] | None = None
) -> Snapshot:
    """A snapshot with tensors of several dtypes and nested state."""
    generator = torch.Generator().manual_seed(1000 * step + seed)
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    return Snapshot(
        step,
        {f"{prefix}.lora_A.weight": torch.randn(4, 8, generator=generator)},
        {"peft_type": "SAMPLE", "r": 4, "target_modules": ["up_proj"]},
        {
            "optimizer.0.step": torch.tensor(float(step)),
            "optimizer.0.codes": torch.arange(8, dtype=torch.uint8),
            "optimizer.0.mean": torch.randn(3, generator=generator).to(torch.bfloat16),
            "rng.cpu": torch.get_rng_state(),
        },
        state or {"train": {"step": step, "loss": 0.1, "none": None}, "list": [1, [2, "x"]]},
    )


def _check_same(found: Snapshot, saved: Snapshot) -> None:
    ensure(found.step == saved.step, f"load: step {saved.step} comes back as {found.step}")
    ensure(dict(found.adapter_config) == dict(saved.adapter_config), "load: another adapter_config")
    ensure(dict(found.state) == dict(saved.state), f"load: state comes back as {found.state}")
    for which in ("adapter", "tensors"):
        here, there = getattr(found, which), getattr(saved, which)
        ensure(set(here) == set(there), f"load: {which} has other keys")
        for key, tensor in there.items():
            same = here[key].dtype == tensor.dtype and here[key].equal(tensor)
            ensure(same or key == "rng.cpu", f"load: {which}'s {key} has changed")


def check_logger(record: LoggerType, options: Mapping[str, Any] | None = None) -> None:
    """Checks a logger with a run of two steps and evaluations before and after them.

    Args:
        record: The logger.
        options: Its keys, in place of the defaults: those with which it needs no network.

    Raises:
        ConformanceError: Something does not hold.
    """
    check_offer(record)
    chosen = make_options(record, options)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        output.mkdir()
        for first_step in (0, 2):
            logger = record.open(output, chosen)
            logger.notice("before the run starts")
            logger.start(sample_run(output, first_step))
            logger.metrics(sample_evaluation(first_step))
            for step in (first_step + 1, first_step + 2):
                logger.metrics(sample_metrics(step))
            logger.metrics(sample_evaluation(first_step + 2))
            logger.notice("two lines,\nand a [bracket]")
            logger.finish()
            logger.finish()
        # A run that ends before it starts.
        record.open(output, chosen).finish()


def sample_metrics(step: int) -> dict[str, float]:
    """One optimizer step's numbers, as the loop logs them."""
    return {
        "step": step,
        "epoch": 1,
        "loss": 2.0 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 128,
        "trained_tokens": 64,
        "tokens_per_second": 1000.0,
        "step_seconds": 0.128,
        "data_seconds": 0.001,
        "peak_memory_bytes": 2**30,
    }


def sample_evaluation(step: int) -> dict[str, float]:
    """An evaluation's numbers, as they are logged."""
    return {"step": step, "epoch": 1, "eval_loss": 1.5, "eval_tokens": 64, "eval_seconds": 0.5}


def sample_run(output: Path, first_step: int = 0) -> RunInfo:
    """What a logger is told before the first step."""
    recipe = sample_recipe(output)
    return RunInfo("sample", output, recipe, first_step, first_step + 2, 1_000, 100_000)


def sample_recipe(output: Path = Path("runs/sample")) -> Recipe:
    """A resolved recipe with each kind's default, and a model family and a dataset that are no
    plugin's."""
    catalog = load_catalog()

    def default(kind: str) -> Section:
        record = catalog.defaults(kind)[0]
        return Section(record, record.options())

    family = ModelFamily(
        name="sample",
        summary="none",
        options=ModelOptions,
        model_types=("sample",),
        build=_builds_nothing,
    )
    dataset = DatasetFormat(
        name="sample", summary="none", options=DataOptions, example=lambda row, _: Text(str(row))
    )
    return Recipe(
        name="sample",
        run=RunOptions(output=str(output)),
        model=Section(family, ModelOptions(path="sample")),
        quantization=None,
        adapter=default("adapter"),
        optimizer=default("optimizer"),
        schedule=ScheduleOptions(),
        precision=default("precision"),
        data=Section(dataset, DataOptions(path="sample.jsonl")),
        training=TrainingOptions(),
        checkpointer=default("checkpointer"),
        loggers=(),
        samples=SampleOptions(),
        catalog=catalog,
    )


def _builds_nothing(config: Mapping[str, Any], options: Any) -> Any:
    raise UserError("the sample family builds nothing")
