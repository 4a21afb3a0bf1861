"""TensorBoard: what its own reader finds in a run's event files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lorakit
from lorakit.protocols import RunInfo
from lorakit_tensorboard.logger import TensorBoardLogger

LOGGERS = [{"name": "tensorboard"}, {"name": "disk"}]


def read(directory: Path) -> EventAccumulator:
    # 0 keeps all events of a kind.
    return EventAccumulator(str(directory), {"scalars": 0, "tensors": 0}).Reload()


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(directory).Scalars(tag)]


def test_it_holds_every_number_of_every_step(
    train_run: Callable[..., Path],
    read_metrics: Callable[[Path], list[dict[str, Any]]],
    numbers: tuple[str, ...],
):
    run = train_run(loggers=LOGGERS, training={"batch_size": 4})
    lines = read_metrics(run)
    assert len(lines) == 3
    assert set(numbers) == set(read(run / "tensorboard").Tags()["scalars"])
    for name in numbers:
        expected = [(line["step"], line[name]) for line in lines]
        found = scalars(run / "tensorboard", name)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6), name


def test_the_recipe_is_there_as_text_and_as_hyperparameters(
    run_info: Callable[..., RunInfo], tmp_path: Path
):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    info = run_info()
    logger = TensorBoardLogger(tmp_path)
    logger.start(info)
    logger.finish()
    events = read(tmp_path)
    (text,) = events.Tensors("recipe")
    assert info.recipe.text() in text.tensor_proto.string_val[0].decode()
    raw = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    chosen = HParamsPluginData.FromString(raw).session_start_info.hparams
    assert chosen["optimizer.lr"].number_value == info.recipe.optimizer.options.lr
    assert chosen["training.epochs"].number_value == 7
    assert chosen["adapter.name"].string_value == "lora"


def test_a_resumed_run_has_each_step_once(
    make_recipe: Callable[..., str], read_metrics: Callable[[Path], list[dict[str, Any]]]
):
    reference = make_recipe(loggers=LOGGERS, training={"batch_size": 4, "epochs": 2})
    run = lorakit.train(reference, overrides={"training.max_steps": 4}).output
    # As a kill after step 6 would leave it: two steps that no checkpoint has.
    ahead = TensorBoardLogger(run / "tensorboard")
    ahead.start(RunInfo("tiny", run, lorakit_recipe(reference), 4, 6, 1, 1))
    for step in (5, 6):
        ahead.metrics({"step": step, "loss": 1e6})
    lorakit.train(reference, resume=True)
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == [1, 2, 3, 4, 5, 6]
    found = scalars(run / "tensorboard", "loss")
    assert [step for step, _ in found] == steps
    assert max(loss for _, loss in found) < 1e6
    assert len(list((run / "tensorboard").iterdir())) == 3


def lorakit_recipe(reference: str) -> Any:
    from lorakit.recipes import resolve_recipe

    return resolve_recipe(reference)


def test_evaluations_stand_beside_the_steps(run_info: Callable[..., RunInfo], tmp_path: Path):
    logger = TensorBoardLogger(tmp_path)
    logger.start(run_info())
    logger.metrics({"step": 1, "loss": 2.0})
    logger.metrics({"step": 1, "eval_loss": 1.5, "eval_tokens": 10})
    # Before it is closed: a run that is killed loses nothing.
    assert scalars(tmp_path, "eval_loss") == [(1, 1.5)]
    assert scalars(tmp_path, "loss") == [(1, 2.0)]
    logger.finish()


def test_a_new_run_takes_the_place_of_one_that_never_got_to_a_checkpoint(
    run_info: Callable[..., RunInfo], tmp_path: Path
):
    for loss in (3.0, 2.0):
        logger = TensorBoardLogger(tmp_path)
        logger.start(run_info())
        logger.metrics({"step": 1, "loss": loss})
        logger.finish()
    assert scalars(tmp_path, "loss") == [(1, 2.0)]


def test_its_files_may_go_elsewhere(train_run: Callable[..., Path], tmp_path: Path):
    there = tmp_path / "boards" / "one"
    run = train_run(
        loggers=[{"name": "tensorboard", "log_dir": str(there)}], training={"max_steps": 1}
    )
    assert [step for step, _ in scalars(there, "loss")] == [1]
    assert not (run / "tensorboard").exists()
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())


def test_a_directory_that_cannot_be_written_is_warned_about_once(
    train_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    run = train_run(
        loggers=[{"name": "tensorboard", "log_dir": str(tmp_path / "file")}, {"name": "disk"}]
    )
    assert capsys.readouterr().err.count("logger 'tensorboard' failed") == 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 12
