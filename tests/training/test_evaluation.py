"""The loss over held-out rows while a run trains: exact, and without a trace in the training."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit import evaluation
from lorakit.builtin.loggers import DiskLogger
from lorakit.builtin.precisions import PlainPrecision
from lorakit.catalog import load_catalog
from lorakit.data.dataset import load_dataset
from lorakit.errors import Interrupted, UserError
from lorakit.modules.layout import Layout
from lorakit.progress import SilentProgress
from lorakit.recipes import resolve_recipe
from lorakit.trained import evaluate, load_trained

# 21 rows in 11 micro-batches in windows of 3: 4 steps an epoch, the last window ragged.
EPOCH, STEPS = 4, 8
SETTINGS = {
    "adapter": {"dropout": 0.2},
    "training": {"batch_size": 2, "gradient_accumulation_steps": 3, "epochs": 2},
}
STABLE = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "eval_loss")
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def eval_file(tmp_path, make_rows) -> Path:
    """Nine rows that the recipe's own do not hold, some of them longer than its longest."""
    file = tmp_path / "unseen.jsonl"
    rows = make_rows(9, seed=77, longest=24)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def recipe(make_recipe, make_rows, eval_file):
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


@pytest.fixture
def evaluations(read_metrics):
    """The lines of evaluations in a run's metrics."""
    return lambda run: [m for m in read_metrics(run) if "eval_loss" in m]


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


def run_of(reference: str) -> Path:
    return Path(reference.rpartition(":")[0]).parent / "run"


def stable(lines) -> list[dict[str, float]]:
    return [{key: line[key] for key in STABLE if key in line} for line in lines]


def assert_same_end(found: Path, expected: Path, read_metrics) -> None:
    """Adapter, state and every logged number, in the same order."""
    assert (found / ADAPTER).read_bytes() == (expected / ADAPTER).read_bytes()
    last = sorted((expected / "checkpoints").iterdir())[-1].name
    place = f"checkpoints/{last}/training_state.json"
    assert (found / place).read_bytes() == (expected / place).read_bytes()
    assert stable(read_metrics(found)) == stable(read_metrics(expected))


def loss_in_double(path: Path, file: Path) -> tuple[float, int]:
    """The mean over the trained tokens of a file, row by row from whole logits, in float64."""
    trained = load_trained(str(path), "cpu")
    model = trained.model.double()
    form = load_catalog().get("dataset", "messages")
    options = form.options(path=str(file), max_seq_len=128)
    data = load_dataset(form, options, trained.tokenizer, SilentProgress())
    total, count = 0.0, 0
    for example in data.examples:
        ids = torch.tensor(list(example.ids))
        with torch.no_grad():
            hidden = model.hidden(ids, Layout.of_lengths([len(ids)]))
            likelihoods = model.logits(hidden).double().log_softmax(-1)
        for place in range(1, len(ids)):
            if example.trained[place]:
                total -= float(likelihoods[place - 1, ids[place]])
                count += 1
    return total / count, count


# ---------------------------------------------------------------- what it computes


def test_eval_loss_is_that_of_lorakit_eval_and_of_float64(
    recipe, evaluations, eval_file, checkpoint
):
    result = lorakit.train(recipe())
    first, *_, last = evaluations(result.output)
    assert (first["step"], last["step"]) == (0, STEPS)
    scores = evaluate(load_trained(str(result.output), "cpu"), str(eval_file))
    assert last["eval_loss"] == pytest.approx(scores.loss, abs=1e-6)
    assert result.eval_loss == last["eval_loss"]
    for line, path in ((first, checkpoint), (last, result.output)):
        expected, count = loss_in_double(path, eval_file)
        assert line["eval_loss"] == pytest.approx(expected, abs=2e-6)
        assert line["eval_tokens"] == count == scores.trained_tokens
        assert line["eval_seconds"] > 0
        assert set(line) == {"step", "epoch", "eval_loss", "eval_tokens", "eval_seconds"}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, [(0, 0), (4, 1), (8, 2)]),
        ({"at_start": False}, [(4, 1), (8, 2)]),
        ({"every_steps": 3}, [(0, 0), (3, 1), (4, 1), (6, 2), (8, 2)]),
        ({"every_steps": 4}, [(0, 0), (4, 1), (8, 2)]),
        ({"every_steps": 100}, [(0, 0), (4, 1), (8, 2)]),
    ],
)
def test_when_it_is_evaluated(times, expected, recipe, evaluations, read_metrics):
    run = lorakit.train(recipe(evaluation=times)).output
    assert [(m["step"], m["epoch"]) for m in evaluations(run)] == expected
    steps = [m["step"] for m in read_metrics(run)]
    assert steps == sorted(steps)


def test_a_run_that_ends_within_an_epoch_is_evaluated_at_its_end(recipe, evaluations):
    run = lorakit.train(recipe(training={"max_steps": 6})).output
    assert [(m["step"], m["epoch"]) for m in evaluations(run)] == [(0, 0), (4, 1), (6, 2)]


def test_max_rows_are_the_first(recipe, evaluations, eval_file, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(eval_file.read_text().splitlines(keepends=True)[:4]))
    first = lorakit.train(recipe(evaluation={"max_rows": 4})).output
    second = lorakit.train(recipe(evaluation={"path": str(few)})).output
    assert stable(evaluations(first)) == stable(evaluations(second))
    assert stable(evaluations(first)) != stable(evaluations(lorakit.train(recipe()).output))


def test_micro_batches_are_no_larger_than_those_of_training(
    recipe, signal_in_evaluation, eval_file, read_metrics
):
    sizes = signal_in_evaluation(0)
    changes = {"training": {"gradient_accumulation_steps": 1, "batch_size": 5}}
    run = lorakit.train(recipe(evaluation={"at_start": False}, **changes)).output
    largest = max(m["tokens"] for m in read_metrics(run) if "loss" in m)
    assert max(sizes) <= largest
    # Two evaluations of nine rows, of which several fit into one.
    assert 2 <= len(sizes) < 2 * 9


# ---------------------------------------------------------------- what it leaves alone


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"fused": False}},
        {"training": {"activation_checkpointing": "block"}},
        {"training": {"activation_checkpointing": "selective"}},
        {"adapter": {"dropout": 0.2, "dora": True}},
        {"data": {"packed": True}},
        {"precision": {"name": "bf16"}},
    ],
    ids=["fused", "autograd", "block", "selective", "dora", "packed", "bf16"],
)
def test_training_is_the_same_bit_for_bit(changes, recipe, read_metrics):
    plain = lorakit.train(recipe(evaluation=None, **changes))
    evaluated = lorakit.train(recipe(evaluation={"every_steps": 1}, **changes))
    assert plain.eval_loss is None
    first, second = plain.output, evaluated.output
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    steps = [m for m in read_metrics(second) if "loss" in m]
    assert len(steps) < len(read_metrics(second))
    assert stable(steps) == stable(read_metrics(first))


def test_a_layer_that_draws_numbers_when_evaluated_changes_nothing(
    recipe, monkeypatch, read_metrics
):
    plain = lorakit.train(recipe(evaluation=None)).output
    real = evaluation.batch_loss

    def drawing(model, batch):
        torch.rand(3)
        return real(model, batch)

    monkeypatch.setattr(evaluation, "batch_loss", drawing)
    run = lorakit.train(recipe(evaluation={"every_steps": 1})).output
    assert (plain / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()


def test_without_the_section_nothing_speaks_of_it(recipe, read_metrics):
    run = lorakit.train(recipe(evaluation=None)).output
    state = json.loads((run / "checkpoints/step-00000008/training_state.json").read_text())
    assert set(state) == {"step", "train", "optimizer", "precision", "data"}
    assert "evaluation" not in (run / "recipe.toml").read_text()
    assert not any(key.startswith("eval") for line in read_metrics(run) for key in line)


def test_a_steps_time_is_without_its_evaluation(recipe, monkeypatch, read_metrics):
    clock = [0.0]
    real = evaluation.mean_loss

    def slow(*arguments):
        clock[0] += 1000.0
        return real(*arguments)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(evaluation, "mean_loss", slow)
    step = PlainPrecision.step

    def stepped(self, *arguments):
        clock[0] += 1.0
        return step(self, *arguments)

    monkeypatch.setattr(PlainPrecision, "step", stepped)
    run = lorakit.train(recipe(evaluation={"every_steps": 1})).output
    monkeypatch.undo()
    lines = read_metrics(run)
    assert {m["step_seconds"] for m in lines if "loss" in m} == {1.0}
    assert {m["eval_seconds"] for m in lines if "eval_loss" in m} == {1000.0}


# ---------------------------------------------------------------- stopped and resumed


# Two of 21 rows held out leave as many steps.
@pytest.mark.parametrize("rows", [{}, {"fraction": 0.1}], ids=["path", "fraction"])
@pytest.mark.parametrize("stop", [1, 2, EPOCH, EPOCH + 1, STEPS - 1])
def test_a_run_stopped_after_a_step_resumes_to_the_same_end(
    stop, rows, recipe, tmp_path, monkeypatch, read_metrics
):
    reference = recipe(evaluation={"every_steps": 2, **rows})
    lorakit.train(reference, output=tmp_path / "whole")
    log, armed, done = DiskLogger.metrics, True, []
    real = evaluation.mean_loss

    def metrics(self, values):
        log(self, values)
        if values["step"] == stop and "loss" in values and armed:
            os.kill(os.getpid(), signal.SIGINT)

    def counted(*arguments):
        loss = real(*arguments)
        if loss is not None:
            done.append(loss)
        return loss

    monkeypatch.setattr(DiskLogger, "metrics", metrics)
    monkeypatch.setattr(evaluation, "mean_loss", counted)
    with pytest.raises(Interrupted):
        lorakit.train(reference)
    armed = False
    result = lorakit.train(reference, resume=True)
    # None is repeated in the second session.
    logged = [m["eval_loss"] for m in read_metrics(result.output) if "eval_loss" in m]
    assert done == logged
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


@pytest.mark.parametrize(
    ("nth", "kind"),
    [(0, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGINT), (4, signal.SIGINT)],
)
def test_a_signal_stops_an_evaluation_between_micro_batches(
    nth, kind, recipe, tmp_path, signal_in_evaluation, monkeypatch, read_metrics
):
    """Of the evaluations at steps 0, 3, 4, 6 and 8; in the second of several micro-batches."""
    reference = recipe(evaluation={"every_steps": 3}, training={"batch_size": 1})
    seen = signal_in_evaluation(0)
    steps = lorakit.train(reference, output=tmp_path / "whole").steps
    evaluated = [m["step"] for m in read_metrics(tmp_path / "whole") if "eval_loss" in m]
    each = len(seen) // len(evaluated)
    assert each >= 3
    seen.clear()
    monkeypatch.undo()
    seen = signal_in_evaluation(nth * each + 2, kind)
    with pytest.raises(Interrupted) as caught:
        lorakit.train(reference)
    monkeypatch.undo()
    assert caught.value.exit_status == 128 + kind
    assert f"stopped at step {evaluated[nth]} of {steps}, and saved" in str(caught.value)
    assert len(seen) == nth * each + 2
    assert not (run_of(reference) / "adapter").exists()
    lorakit.train(reference, resume=True)
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


@pytest.mark.parametrize("crash", [2, 3, 5, 6, 8])
def test_a_crashed_run_has_each_evaluation_once(crash, recipe, tmp_path, monkeypatch, read_metrics):
    reference = recipe(
        evaluation={"every_steps": 1, "keep_best": False}, checkpointer={"every_steps": 3}
    )
    lorakit.train(reference, output=tmp_path / "whole")
    step, count = PlainPrecision.step, 0

    def broken(self, *arguments):
        nonlocal count
        count += 1
        if count == crash:
            raise RuntimeError("the power went")
        return step(self, *arguments)

    monkeypatch.setattr(PlainPrecision, "step", broken)
    with pytest.raises(RuntimeError, match="the power went"):
        lorakit.train(reference)
    monkeypatch.undo()
    resume = any((run_of(reference) / "checkpoints").glob("step-*"))
    assert resume == (crash > 3)
    lorakit.train(reference, resume=resume)
    run = run_of(reference)
    assert_same_end(run, tmp_path / "whole", read_metrics)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        # Of the evaluations at steps 0 to 8, the last two checkpoints being those of 4 and 8.
        ([9, 8, 3, 4, 5, 6, 7, 8, 9], [2, 4, 8]),
        ([9, 8, 7, 6, 5, 1, 2, 3, 4], [5, 8]),
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], [7, 8]),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 8]),
        ([5, 5, 5, 5, 5, 5, 5, 5, 5], [4, 8]),
    ],
)
@pytest.mark.parametrize("killed", [False, True])
def test_the_best_checkpoint_is_kept(killed, losses, kept, recipe, monkeypatch):
    at = iter(range(99))
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: float(losses[next(at)]))
    reference = recipe(evaluation={"every_steps": 1})
    if killed:
        step, done = PlainPrecision.step, []

        def broken(self, *arguments):
            done.append(1)
            if len(done) == 7:
                raise RuntimeError("the power went")
            return step(self, *arguments)

        monkeypatch.setattr(PlainPrecision, "step", broken)
        with pytest.raises(RuntimeError, match="the power went"):
            lorakit.train(reference)
        last = max(int(p.name[5:]) for p in (run_of(reference) / "checkpoints").iterdir())
        at = iter(range(last + 1, 99))
    lorakit.train(reference, resume=killed)
    names = sorted(p.name for p in (run_of(reference) / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in kept]


def test_an_evaluation_done_again_is_logged_once(
    recipe, tmp_path, signal_in_evaluation, monkeypatch, read_metrics
):
    """Stopped in the evaluation at step 4, resumed, and killed once that is done."""
    reference = recipe()
    lorakit.train(reference, output=tmp_path / "whole")
    seen = signal_in_evaluation(0)
    lorakit.train(reference, output=tmp_path / "counted")
    each = len(seen) // 3
    monkeypatch.undo()
    seen.clear()
    signal_in_evaluation(each + 1)
    with pytest.raises(Interrupted):
        lorakit.train(reference)
    monkeypatch.undo()

    def broken(*_):
        raise RuntimeError("the power went")

    monkeypatch.setattr(PlainPrecision, "step", broken)
    with pytest.raises(RuntimeError):
        lorakit.train(reference, resume=True)
    monkeypatch.undo()
    assert [m["step"] for m in read_metrics(run_of(reference)) if "eval_loss" in m] == [0, 4]
    lorakit.train(reference, resume=True)
    assert_same_end(run_of(reference), tmp_path / "whole", read_metrics)


def test_a_resumed_run_may_be_evaluated_over_other_rows_but_not_hold_out_others(
    recipe, monkeypatch
):
    reference = recipe()
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "mean_loss", lambda *_: 0.001)
        lorakit.train(reference)
    longer = {"training.epochs": 3}
    few = {**longer, "evaluation.max_rows": 2}
    lorakit.train(reference, resume=True, overrides=few)
    state = run_of(reference) / "checkpoints/step-00000012/training_state.json"
    # The losses over all rows do not compare with those over two.
    assert json.loads(state.read_text())["evaluation"]["lowest_step"] in (8, 12)
    assert json.loads(state.read_text())["evaluation"]["lowest_loss"] > 0.001

    reference = recipe(evaluation={"fraction": 0.2})
    lorakit.train(reference)
    with pytest.raises(UserError, match=r"evaluation\.fraction: the run was started with 0\.2"):
        lorakit.train(reference, resume=True, overrides={**longer, "evaluation.fraction": 0.3})
    with pytest.raises(UserError, match=r"data file \(and evaluation\.max_rows\) back"):
        lorakit.train(reference, resume=True, overrides={**longer, "evaluation.max_rows": 1})


def test_the_resolved_recipe_repeats_the_run(recipe, tmp_path, monkeypatch, read_metrics):
    """From another directory, with a relative path."""
    reference = recipe(evaluation={"path": "unseen.jsonl", "every_steps": 2})
    monkeypatch.chdir(tmp_path)
    run = lorakit.train(reference).output
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = lorakit.train(f"{run}/recipe.toml:tiny", output=elsewhere / "run").output
    assert resolve_recipe(f"{run}/recipe.toml:tiny").evaluation.every_steps == 2
    assert_same_end(again, run, read_metrics)
