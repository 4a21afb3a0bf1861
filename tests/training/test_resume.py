"""A run that is stopped and resumed ends where an uninterrupted one does, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorakit
from lorakit.builtin import snapshots
from lorakit.builtin.loggers import DiskLogger
from lorakit.builtin.precisions import PlainPrecision
from lorakit.cli import main
from lorakit.errors import Interrupted, RunError, UserError
from lorakit.protocols import Snapshot
from lorakit.samples import Samples
from lorakit.weights.shard_writer import ShardWriter

# 21 rows in 11 micro-batches in windows of 3: 4 steps an epoch, the last window ragged.
EPOCH = 4
SETTINGS = {
    "adapter": {"dropout": 0.2},
    "training": {"batch_size": 2, "gradient_accumulation_steps": 3, "epochs": 2},
    "schedule": {"name": "linear", "warmup_steps": 2},
}
STABLE = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens")


@pytest.fixture
def recipe(make_recipe, make_rows):
    def recipe(**changes) -> str:
        sections = {k: {**SETTINGS.get(k, {}), **v} for k, v in changes.items()}
        return make_recipe(make_rows(21), **{**SETTINGS, **sections})

    return recipe


def run_of(reference: str) -> Path:
    return Path(reference.rpartition(":")[0]).parent / "run"


def assert_same_end(found: Path, expected: Path, read_metrics) -> None:
    """Adapter, optimizer, random generators, loop state and every logged number."""
    file = "adapter/adapter_model.safetensors"
    assert (found / file).read_bytes() == (expected / file).read_bytes()
    last = sorted((expected / "checkpoints").iterdir())[-1].name
    for name in ("training_state.safetensors", "training_state.json"):
        place = f"checkpoints/{last}/{name}"
        assert (found / place).read_bytes() == (expected / place).read_bytes()
    pairs = zip(read_metrics(found), read_metrics(expected), strict=True)
    for ours, theirs in pairs:
        assert {k: ours[k] for k in STABLE} == {k: theirs[k] for k in STABLE}


@pytest.fixture
def signal_at(monkeypatch):
    """Sends this process a signal once a step is logged."""

    def arm(step: int, number: int = signal.SIGINT) -> None:
        log = DiskLogger.metrics

        def metrics(self, values):
            log(self, values)
            if values["step"] == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(DiskLogger, "metrics", metrics)

    yield arm
    monkeypatch.undo()


@pytest.fixture
def crash_in_step(monkeypatch):
    def arm(step: int) -> None:
        real = PlainPrecision.step
        count = 0

        def broken(self, optimizer, max_norm):
            nonlocal count
            count += 1
            if count == step:
                raise RuntimeError("the power went")
            return real(self, optimizer, max_norm)

        monkeypatch.setattr(PlainPrecision, "step", broken)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("stop", [1, 2, EPOCH, EPOCH + 1, 2 * EPOCH - 1])
@pytest.mark.parametrize(
    "changes",
    [{}, {"data": {"packed": True, "max_seq_len": 150}, "training": {"batch_size": 1}}],
    ids=["unpacked", "packed"],
)
def test_interrupted_run_resumes_to_the_same_adapter(
    changes, stop, recipe, tmp_path, signal_at, monkeypatch, read_metrics
):
    reference = recipe(**changes)
    whole = lorakit.train(reference, output=tmp_path / "whole")
    assert whole.steps > stop
    signal_at(stop)
    with pytest.raises(Interrupted, match=f"step {stop} of {whole.steps}.*--resume"):
        lorakit.train(reference)
    monkeypatch.undo()
    assert not (run_of(reference) / "adapter").exists()
    resumed = lorakit.train(reference, resume=True)
    assert (resumed.steps, resumed.loss) == (whole.steps, whole.loss)
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "sgd", "momentum": 0.9, "lr": 1e-2}},
        {"adapter": {"dora": True}},
        {"training": {"activation_checkpointing": "block"}},
        {"training": {"activation_checkpointing": "selective"}},
        {"data": {"shuffle": False}},
    ],
    ids=["sgd_momentum", "dora", "block", "selective", "file_order"],
)
def test_resume_is_exact_whatever_is_trained_how(
    changes, recipe, tmp_path, signal_at, monkeypatch, read_metrics
):
    changes = {k: {"name": "adamw"} | v if k == "optimizer" else v for k, v in changes.items()}
    reference = recipe(**changes)
    lorakit.train(reference, output=tmp_path / "whole")
    signal_at(EPOCH + 2)
    with pytest.raises(Interrupted):
        lorakit.train(reference)
    monkeypatch.undo()
    lorakit.train(reference, resume=True)
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


@pytest.mark.parametrize(("crash", "resumed_from"), [(EPOCH, 3), (EPOCH + 1, EPOCH), (8, 6)])
def test_crashed_run_resumes_from_its_last_checkpoint(
    crash, resumed_from, recipe, tmp_path, crash_in_step, monkeypatch, read_metrics
):
    reference = recipe(checkpointer={"every_steps": 3})
    lorakit.train(reference, output=tmp_path / "whole")
    crash_in_step(crash)
    with pytest.raises(RuntimeError, match="the power went"):
        lorakit.train(reference)
    monkeypatch.undo()
    assert len(read_metrics(run_of(reference))) == crash - 1
    last = sorted((run_of(reference) / "checkpoints").iterdir())[-1]
    assert last.name == f"step-{resumed_from:08d}"
    with (run_of(reference) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    lorakit.train(reference, resume=True)
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


def test_run_stopped_twice_resumes_twice(recipe, tmp_path, signal_at, monkeypatch, read_metrics):
    reference = recipe()
    lorakit.train(reference, output=tmp_path / "whole")
    for stop, resume in ((2, False), (5, True)):
        signal_at(stop)
        with pytest.raises(Interrupted):
            lorakit.train(reference, resume=resume)
        monkeypatch.undo()
    lorakit.train(reference, resume=True)
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


def test_resuming_a_finished_run_changes_nothing(recipe, read_metrics):
    reference = recipe()
    first = lorakit.train(reference)
    before = (first.output / "adapter/adapter_model.safetensors").read_bytes()
    again = lorakit.train(reference, resume=True)
    assert (again.steps, again.loss) == (first.steps, first.loss)
    assert (first.output / "adapter/adapter_model.safetensors").read_bytes() == before
    assert [m["step"] for m in read_metrics(first.output)] == list(range(1, 9))


LONG = {"training": {"batch_size": 1, "gradient_accumulation_steps": 1, "epochs": 12}}


def start(reference: str) -> subprocess.Popen:
    """`lorakit train`, returned once it has logged 30 of its 252 steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", "train", reference],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run_of(reference) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 30:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_process_leaves_a_run_that_resumes_exactly(number, recipe, tmp_path, read_metrics):
    reference = recipe(**LONG, checkpointer={"every_steps": 7})
    process = start(reference)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    logged = len(read_metrics(run_of(reference)))
    assert 30 <= logged < 252
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert "--resume" in errors
        assert "Traceback" not in errors
        checkpoints = sorted(p.name for p in (run_of(reference) / "checkpoints").iterdir())
        assert checkpoints[-1] == f"step-{logged:08d}"
    lorakit.train(reference, resume=True)
    lorakit.train(reference, output=tmp_path / "whole")
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


@pytest.mark.parametrize("resumed", [False, True])
def test_interrupted_before_the_first_step(resumed, recipe, signal_at, monkeypatch, capsys):
    reference = recipe(samples={"prompts": ["What?"], "max_new_tokens": 2})
    if resumed:
        signal_at(2)
        with pytest.raises(Interrupted):
            lorakit.train(reference)
        monkeypatch.undo()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Samples, "before", interrupt)
    with pytest.raises(SystemExit) as exited:
        main(["train", reference, *(["--resume"] if resumed else [])])
    assert exited.value.code == 130
    said = capsys.readouterr().err
    if resumed:
        command = f"lorakit train {run_of(reference) / 'recipe.toml'}:tiny --resume"
        assert f"lorakit: stopped; step 2 is saved, go on with: {command}" in said
    else:
        assert "lorakit: stopped before the first step was done; nothing was saved" in said


@pytest.fixture
def stopped(recipe, signal_at, monkeypatch) -> str:
    """A recipe whose run was stopped after step 3, with checkpoints of steps 2 and 3."""
    reference = recipe(checkpointer={"every_steps": 2})
    signal_at(3)
    with pytest.raises(Interrupted):
        lorakit.train(reference)
    monkeypatch.undo()
    return reference


def test_half_written_checkpoints_are_ignored(stopped, tmp_path, read_metrics):
    checkpoints = run_of(stopped) / "checkpoints"
    without_manifest = checkpoints / "step-00000006"
    shutil.copytree(checkpoints / "step-00000003", without_manifest)
    (without_manifest / "training_state.json").unlink()
    shutil.copytree(checkpoints / "step-00000003", checkpoints / ".step-00000007.x1y2")
    (checkpoints / "step-00000008").mkdir()
    lorakit.train(stopped, resume=True)
    lorakit.train(stopped, output=tmp_path / "whole")
    assert_same_end(run_of(stopped), tmp_path / "whole", read_metrics)


def test_checkpoint_that_is_damaged_is_named_with_the_way_out(stopped):
    place = run_of(stopped) / "checkpoints/step-00000003/training_state.safetensors"
    place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"(?s)step-00000003.*Delete that directory"):
        lorakit.train(stopped, resume=True)
    shutil.rmtree(place.parent)
    assert lorakit.train(stopped, resume=True).steps == 8


def test_resume_without_a_complete_checkpoint_is_refused(stopped, tmp_path):
    for manifest in (run_of(stopped) / "checkpoints").glob("*/training_state.json"):
        manifest.unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        lorakit.train(stopped, resume=True)
    with pytest.raises(UserError, match="holds no run"):
        lorakit.train(stopped, resume=True, output=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "1"),
        ("adapter.rank", "5"),
        ("optimizer.lr", "0.1"),
        ("schedule.name", "cosine"),
        ("data.max_seq_len", "99"),
        ("data.shuffle", "false"),
        ("training.batch_size", "1"),
        ("training.max_grad_norm", "0.5"),
    ],
)
def test_resume_under_another_recipe_is_refused_naming_the_key(key, value, stopped, capsys):
    from lorakit.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["train", stopped, "--resume", "--set", f"{key}={value}", "--set", "device=cpu"])
    assert caught.value.code == 2
    assert f"{key}: the run was started with" in capsys.readouterr().err


def test_resume_names_every_key_that_differs(stopped):
    with pytest.raises(UserError) as caught:
        lorakit.train(stopped, resume=True, overrides={"adapter.rank": 5, "optimizer.lr": 0.5})
    assert "2 problems" in str(caught.value)
    assert "adapter.rank" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)


def test_resume_may_go_on_for_longer(stopped):
    result = lorakit.train(stopped, resume=True, overrides={"training.epochs": 3})
    assert result.steps == 3 * EPOCH


def test_resume_on_other_data_is_refused(stopped):
    data = run_of(stopped).parent / "data.jsonl"
    data.write_text(data.read_text().replace("Model", "Mode1").replace("the", "these"))
    with pytest.raises(UserError, match="the data is not what the run was started with"):
        lorakit.train(stopped, resume=True)


def test_new_run_never_takes_the_place_of_another(stopped):
    before = sorted((run_of(stopped) / "checkpoints").iterdir())
    with pytest.raises(UserError, match="holds a run already"):
        lorakit.train(stopped, output=run_of(stopped))
    assert lorakit.train(stopped).output == run_of(stopped).with_name("run-2")
    assert sorted((run_of(stopped) / "checkpoints").iterdir()) == before


@pytest.mark.parametrize(("keep", "kept"), [(1, [8]), (3, [6, 7, 8]), (0, list(range(1, 9)))])
def test_keep_last_says_how_many_checkpoints_stay(keep, kept, recipe):
    reference = recipe(checkpointer={"every_steps": 1, "keep_last": keep})
    lorakit.train(reference)
    names = sorted(p.name for p in (run_of(reference) / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "training_state.json"])
def test_save_that_fails_leaves_the_checkpoint_before(
    file, recipe, tmp_path, monkeypatch, read_metrics
):
    reference = recipe(checkpointer={"every_steps": 3, "keep_last": 1})
    real, real_tensor = snapshots.write_bytes, ShardWriter.write

    def full(path):
        return path.name == file and (run_of(reference) / "checkpoints/step-00000003").exists()

    def write(path, content):
        real(path, content[: len(content) // 2] if full(path) else content)
        if full(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    def write_tensor(writer, name, tensor):
        real_tensor(writer, name, tensor)
        if full(Path(writer._file.name)):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "write_bytes", write)
    monkeypatch.setattr(ShardWriter, "write", write_tensor)
    with pytest.raises(RunError, match="No space left on device"):
        lorakit.train(reference)
    monkeypatch.undo()
    names = [p.name for p in (run_of(reference) / "checkpoints").iterdir()]
    assert names == ["step-00000003"]
    lorakit.train(reference, resume=True)
    lorakit.train(reference, output=tmp_path / "whole")
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


def test_rename_that_fails_leaves_the_checkpoint_it_would_replace(stopped, monkeypatch):
    store = snapshots.SafetensorsStore(run_of(stopped) / "checkpoints", keep_last=1)
    before = store.load(3)
    real = Path.rename

    def rename(self, target):
        if Path(target).name == "step-00000003" and self.name.startswith(".step-00000003."):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match="Input/output error"):
        store.save(Snapshot(3, {}, {}, {}, {}))
    monkeypatch.undo()
    assert store.steps() == [2, 3]
    assert json.dumps(store.load(3).state) == json.dumps(before.state)
    assert sorted(p.name for p in store.root.iterdir()) == ["step-00000002", "step-00000003"]
