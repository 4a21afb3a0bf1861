"""Evaluations of a run that is stopped, killed and resumed: each is made and logged once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import lorakit
from lorakit import evaluation
from lorakit.builtin.loggers import DiskLogger
from lorakit.builtin.precisions import PlainPrecision
from lorakit.errors import Interrupted, UserError
from lorakit.recipes import resolve_recipe

# In an epoch of the recipe, and in all of it.
EPOCH, STEPS = 4, 8
ADAPTER = "adapter/adapter_model.safetensors"


def run_of(reference: str) -> Path:
    return Path(reference.rpartition(":")[0]).parent / "run"


@pytest.fixture
def assert_same_end(stable, read_metrics):
    """Adapter, state and every logged number, in the same order."""

    def assert_same_end(found: Path, expected: Path) -> None:
        assert (found / ADAPTER).read_bytes() == (expected / ADAPTER).read_bytes()
        last = sorted((expected / "checkpoints").iterdir())[-1].name
        place = f"checkpoints/{last}/training_state.json"
        assert (found / place).read_bytes() == (expected / place).read_bytes()
        assert stable(read_metrics(found)) == stable(read_metrics(expected))

    return assert_same_end


# Two of 21 rows held out leave as many steps.
@pytest.mark.parametrize("rows", [{}, {"fraction": 0.1}], ids=["path", "fraction"])
@pytest.mark.parametrize("stop", [1, 2, EPOCH, EPOCH + 1, STEPS - 1])
def test_a_run_stopped_after_a_step_resumes_to_the_same_end(
    stop, rows, evaluated_recipe, tmp_path, monkeypatch, read_metrics, assert_same_end
):
    reference = evaluated_recipe(evaluation={"every_steps": 2, **rows})
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
    assert_same_end(run_of(reference), tmp_path / "whole")


@pytest.mark.parametrize(
    ("nth", "kind"),
    [(0, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGINT), (4, signal.SIGINT)],
)
def test_a_signal_stops_an_evaluation_between_micro_batches(
    nth,
    kind,
    evaluated_recipe,
    tmp_path,
    signal_in_evaluation,
    monkeypatch,
    read_metrics,
    assert_same_end,
):
    """Of the evaluations at steps 0, 3, 4, 6 and 8; in the second of several micro-batches."""
    reference = evaluated_recipe(evaluation={"every_steps": 3}, training={"batch_size": 1})
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
    assert_same_end(run_of(reference), tmp_path / "whole")


@pytest.mark.parametrize("crash", [2, 3, 5, 6, 8])
def test_a_crashed_run_has_each_evaluation_once(
    crash, evaluated_recipe, tmp_path, monkeypatch, assert_same_end
):
    reference = evaluated_recipe(
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
    assert_same_end(run, tmp_path / "whole")


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
def test_the_best_checkpoint_is_kept(killed, losses, kept, evaluated_recipe, monkeypatch):
    at = iter(range(99))
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: float(losses[next(at)]))
    reference = evaluated_recipe(evaluation={"every_steps": 1})
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
    evaluated_recipe, tmp_path, signal_in_evaluation, monkeypatch, read_metrics, assert_same_end
):
    """Stopped in the evaluation at step 4, resumed, and killed once that is done."""
    reference = evaluated_recipe()
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
    assert_same_end(run_of(reference), tmp_path / "whole")


def test_a_resumed_run_may_be_evaluated_over_other_rows_but_not_hold_out_others(
    evaluated_recipe, monkeypatch
):
    reference = evaluated_recipe()
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

    reference = evaluated_recipe(evaluation={"fraction": 0.2})
    lorakit.train(reference)
    with pytest.raises(UserError, match=r"evaluation\.fraction: the run was started with 0\.2"):
        lorakit.train(reference, resume=True, overrides={**longer, "evaluation.fraction": 0.3})
    with pytest.raises(UserError, match=r"data file \(and evaluation\.max_rows\) back"):
        lorakit.train(reference, resume=True, overrides={**longer, "evaluation.max_rows": 1})


def test_the_resolved_recipe_repeats_the_run(
    evaluated_recipe, tmp_path, monkeypatch, assert_same_end
):
    """From another directory, with a relative path."""
    reference = evaluated_recipe(evaluation={"path": "unseen.jsonl", "every_steps": 2})
    monkeypatch.chdir(tmp_path)
    run = lorakit.train(reference).output
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = lorakit.train(f"{run}/recipe.toml:tiny", output=elsewhere / "run").output
    assert resolve_recipe(f"{run}/recipe.toml:tiny").evaluation.every_steps == 2
    assert_same_end(again, run)


def test_an_evaluation_made_up_for_at_the_end_is_made_once(
    evaluated_recipe, tmp_path, signal_in_evaluation, monkeypatch
):
    reference = evaluated_recipe(training={"batch_size": 1})
    seen = signal_in_evaluation(0)
    lorakit.train(reference, output=tmp_path / "counted")
    all_of_them = len(seen)
    seen.clear()
    monkeypatch.undo()
    signal_in_evaluation(all_of_them - 1)
    with pytest.raises(Interrupted):
        lorakit.train(reference)
    monkeypatch.undo()
    seen = signal_in_evaluation(0)
    seen.clear()
    for _ in range(2):
        assert lorakit.train(reference, resume=True).eval_loss is not None
        assert len(seen) == all_of_them // 3


def test_a_last_loss_that_is_not_finite_is_no_good_one(evaluated_recipe, monkeypatch):
    losses = iter([4.0, 3.0, float("nan")])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: next(losses))
    results = []
    told = evaluation.results_lines
    monkeypatch.setattr(
        lorakit.run, "results_lines", lambda *given: results.append(told(*given)) or results[-1]
    )
    assert lorakit.train(evaluated_recipe()).eval_loss is None
    ((ended, kept),) = results
    assert ended == "the last eval loss is not finite, the lowest was 3.0000 at step 4"
    assert kept.startswith("the checkpoint of step 4 is kept: ")
