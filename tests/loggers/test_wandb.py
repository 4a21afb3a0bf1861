"""Weights & Biases: what its real client leaves in an offline run's file, and what happens when
its server is out of reach."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

import lorakit
from lorakit.logs import LoggerGroup
from lorakit.protocols import RunInfo
from lorakit_wandb import WandbOptions
from lorakit_wandb.logger import WandbLogger

OFFLINE = {"name": "wandb", "mode": "offline", "project": "tests"}
KEY = "a" * 40


@pytest.fixture(autouse=True)
def _own_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key or setting of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def files(run: Path) -> list[Path]:
    """The W&B files of a run's sessions, oldest first."""
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)


HEADER, BLOCK = 7, 32 * 1024


def scan(file: Path) -> Iterator[Record]:
    """The protocol buffers of a .wandb file so far: LevelDB's log format behind a header of its
    own, in blocks that a record is cut at (github.com/google/leveldb, doc/log_format.md)."""
    data, at, record = file.read_bytes(), HEADER, b""
    assert data.startswith(b":W&B")
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        # 1 is a whole record, 2 the first part of one, 3 a middle part, 4 the last.
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def records(file: Path) -> list[Record]:
    """Those of a run that has finished: W&B's own process may still be writing the last."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = list(scan(file))
        if found and found[-1].WhichOneof("record_type") in ("exit", "footer"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{file} has no end")


def history(file: Path) -> list[dict[str, Any]]:
    rows = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def start_record(file: Path) -> Any:
    return next(r.run for r in records(file) if r.WhichOneof("record_type") == "run")


def config(file: Path) -> dict[str, Any]:
    return {u.key: json.loads(u.value_json) for u in start_record(file).config.update}


def test_it_holds_every_number_of_every_step_and_the_recipe(
    train_run: Callable[..., Path],
    read_metrics: Callable[[Path], list[dict[str, Any]]],
    numbers: tuple[str, ...],
):
    run = train_run(loggers=[OFFLINE, {"name": "disk"}], training={"batch_size": 4})
    (file,) = files(run)
    rows = history(file)
    assert [row["_step"] for row in rows] == [1, 2, 3]
    for row, line in zip(rows, read_metrics(run), strict=True):
        assert {name: row[name] for name in numbers} == {name: line[name] for name in numbers}
    assert config(file)["optimizer"]["lr"] == 5e-3
    assert config(file)["training"]["batch_size"] == 4
    assert config(file)["recipe"] == "tiny"


def test_its_options_are_the_runs(run_info: Callable[..., RunInfo]):
    options = WandbOptions(
        project="p", entity="e", group="g", tags=("a", "b"), run_name="n", mode="offline"
    )
    info = run_info()
    logger = WandbLogger(options)
    logger.start(info)
    logger.finish()
    (file,) = files(info.output)
    record = start_record(file)
    assert (record.project, record.entity, record.run_group) == ("p", "e", "g")
    assert (list(record.tags), record.display_name) == (["a", "b"], "n")


def test_a_resumed_run_goes_on_in_the_same_wandb_run(make_recipe: Callable[..., str]):
    reference = make_recipe(loggers=[OFFLINE], training={"batch_size": 4, "epochs": 2})
    run = lorakit.train(reference, overrides={"training.max_steps": 4}).output
    lorakit.train(reference, overrides={"loggers": [{**OFFLINE, "project": "other"}]}, resume=True)
    first, second = files(run)
    stored = json.loads((run / "wandb-run.json").read_text())
    for file in (first, second):
        assert (start_record(file).run_id, start_record(file).project) == (stored["id"], "tests")
    assert [row["_step"] for row in history(first)] == [1, 2, 3, 4]
    assert [row["_step"] for row in history(second)] == [5, 6]


def test_a_new_run_in_the_same_place_is_a_new_wandb_run(run_info: Callable[..., RunInfo]):
    found = set()
    for _ in range(2):
        logger = WandbLogger(WandbOptions(mode="offline"))
        logger.start(run_info())
        logger.finish()
        found.add(json.loads((run_info().output / "wandb-run.json").read_text())["id"])
    assert len(found) == 2


def test_steps_the_server_has_already_are_not_sent_again(
    run_info: Callable[..., RunInfo], monkeypatch: pytest.MonkeyPatch
):
    import wandb

    # What a server answers a run that was killed at step 5: the next step is 6.
    monkeypatch.setattr(wandb.Run, "step", property(lambda run: 6))
    logger = WandbLogger(WandbOptions(mode="offline"))
    info = run_info(first_step=4)
    logger.start(info)
    for step in (5, 6, 7):
        logger.metrics({"step": step, "loss": 1.0})
    logger.finish()
    assert [row["_step"] for row in history(files(info.output)[0])] == [6, 7]


def test_evaluations_stand_beside_the_steps(run_info: Callable[..., RunInfo]):
    info = run_info()
    logger = WandbLogger(WandbOptions(mode="offline"))
    logger.start(info)
    logger.metrics({"step": 1, "loss": 2.0})
    logger.metrics({"step": 1, "eval_loss": 1.5})
    logger.metrics({"step": 2, "loss": 1.0})
    logger.finish()
    rows = history(files(info.output)[0])
    assert [(r["_step"], r["loss"], r.get("eval_loss")) for r in rows] == [
        (1, 2, 1.5),
        (2, 1, None),
    ]


def test_a_run_that_fails_is_a_failed_wandb_run(run_info: Callable[..., RunInfo]):
    info = run_info()
    logger = WandbLogger(WandbOptions(mode="offline"))
    with contextlib.suppress(ZeroDivisionError), LoggerGroup({"wandb": logger}) as group:
        group.start(info)
        _ = 1 / 0
    exits = [
        r.exit.exit_code
        for r in records(files(info.output)[0])
        if r.WhichOneof("record_type") == "exit"
    ]
    assert exits == [1]


def test_disabled_leaves_nothing(train_run: Callable[..., Path]):
    run = train_run(loggers=[{"name": "wandb", "mode": "disabled"}], training={"max_steps": 1})
    assert not list(run.glob("wandb*"))


def test_wandb_mode_decides_unless_the_recipe_does(
    run_info: Callable[..., RunInfo], monkeypatch: pytest.MonkeyPatch
):
    info = run_info()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for mode in ("auto", "offline"):
        logger = WandbLogger(WandbOptions(mode=mode))
        logger.start(info)
        logger.finish()
    assert len(files(info.output)) == 1


def test_a_damaged_id_is_a_warning_and_training_goes_on(
    make_recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
):
    reference = make_recipe(loggers=[OFFLINE], training={"batch_size": 4, "epochs": 2})
    run = lorakit.train(reference, overrides={"training.max_steps": 4}).output
    (run / "wandb-run.json").write_text("{")
    assert lorakit.train(reference, resume=True).steps == 6
    error = capsys.readouterr().err
    assert "logger 'wandb' failed" in error
    assert "wandb-run.json does not say which" in error
    assert len(files(run)) == 1


def train_online(reference: str, **environment: str) -> tuple[str, float]:
    """Trains in a process of its own, since W&B reads its settings once; what it wrote to
    stderr, and the seconds it took."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "train", reference],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, time.monotonic() - started


ONLINE = {"name": "wandb", "mode": "online", "timeout": 1.0}


def test_without_a_key_it_logs_offline(make_recipe: Callable[..., str]):
    reference = make_recipe(loggers=[ONLINE], training={"max_steps": 2})
    error, _ = train_online(reference)
    assert "no API key" in error
    assert "logging offline" in error
    (file,) = files(Path(reference.partition(":")[0]).parent / "run")
    assert [row["_step"] for row in history(file)] == [1, 2]


@pytest.mark.slow
def test_a_server_that_never_answers_delays_a_run_but_does_not_stop_it(
    make_recipe: Callable[..., str],
):
    reference = make_recipe(loggers=[ONLINE], training={"max_steps": 2})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        # Without its error reports, wandb spends less time on its way out.
        error, seconds = train_online(
            reference, WANDB_BASE_URL=url, WANDB_API_KEY=KEY, WANDB_ERROR_REPORTING="false"
        )
    assert "logging offline" in error
    assert seconds < 45
    (file,) = files(Path(reference.partition(":")[0]).parent / "run")
    assert [row["_step"] for row in history(file)] == [1, 2]
