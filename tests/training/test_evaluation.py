"""The loss over held-out rows while a run trains: exact, and without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit import evaluation
from lorakit.builtin.precisions import PlainPrecision
from lorakit.catalog import load_catalog
from lorakit.data.dataset import load_dataset
from lorakit.modules.layout import Layout
from lorakit.progress import SilentProgress
from lorakit.trained import evaluate, load_trained

# Of the recipe.
STEPS = 8
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def evaluations(read_metrics):
    """The lines of evaluations in a run's metrics."""
    return lambda run: [m for m in read_metrics(run) if "eval_loss" in m]


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


def test_it_is_computed_as_training_is(evaluated_recipe, monkeypatch):
    """In as many threads, and what rows begin with in common once."""
    seen = []
    real = evaluation.mean_loss

    def watched(model, rows, *others):
        seen.append((rows.threads, rows.share_prefixes))
        return real(model, rows, *others)

    monkeypatch.setattr(evaluation, "mean_loss", watched)
    monkeypatch.setattr("lorakit.assemble.document_threads", lambda *_: 2)
    lorakit.train(evaluated_recipe())
    assert set(seen) == {(2, True)}


def test_eval_loss_is_that_of_lorakit_eval_and_of_float64(
    evaluated_recipe, evaluations, eval_file, checkpoint
):
    result = lorakit.train(evaluated_recipe())
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
def test_when_it_is_evaluated(times, expected, evaluated_recipe, evaluations, read_metrics):
    run = lorakit.train(evaluated_recipe(evaluation=times)).output
    assert [(m["step"], m["epoch"]) for m in evaluations(run)] == expected
    steps = [m["step"] for m in read_metrics(run)]
    assert steps == sorted(steps)


def test_a_run_that_ends_within_an_epoch_is_evaluated_at_its_end(evaluated_recipe, evaluations):
    run = lorakit.train(evaluated_recipe(training={"max_steps": 6})).output
    assert [(m["step"], m["epoch"]) for m in evaluations(run)] == [(0, 0), (4, 1), (6, 2)]


def test_max_rows_are_the_first(evaluated_recipe, evaluations, eval_file, tmp_path, stable):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(eval_file.read_text().splitlines(keepends=True)[:4]))
    first = lorakit.train(evaluated_recipe(evaluation={"max_rows": 4})).output
    second = lorakit.train(evaluated_recipe(evaluation={"path": str(few)})).output
    assert stable(evaluations(first)) == stable(evaluations(second))
    assert stable(evaluations(first)) != stable(
        evaluations(lorakit.train(evaluated_recipe()).output)
    )


def test_micro_batches_are_no_larger_than_those_of_training(
    evaluated_recipe, signal_in_evaluation, eval_file, read_metrics
):
    sizes = signal_in_evaluation(0)
    changes = {"training": {"gradient_accumulation_steps": 1, "batch_size": 5}}
    run = lorakit.train(evaluated_recipe(evaluation={"at_start": False}, **changes)).output
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
def test_training_is_the_same_bit_for_bit(changes, evaluated_recipe, read_metrics, stable):
    plain = lorakit.train(evaluated_recipe(evaluation=None, **changes))
    evaluated = lorakit.train(evaluated_recipe(evaluation={"every_steps": 1}, **changes))
    assert plain.eval_loss is None
    first, second = plain.output, evaluated.output
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    steps = [m for m in read_metrics(second) if "loss" in m]
    assert len(steps) < len(read_metrics(second))
    assert stable(steps) == stable(read_metrics(first))


def test_a_layer_that_draws_numbers_when_evaluated_changes_nothing(evaluated_recipe, monkeypatch):
    plain = lorakit.train(evaluated_recipe(evaluation=None)).output
    real = evaluation.batch_loss

    def drawing(model, batch):
        torch.rand(3)
        return real(model, batch)

    monkeypatch.setattr(evaluation, "batch_loss", drawing)
    run = lorakit.train(evaluated_recipe(evaluation={"every_steps": 1})).output
    assert (plain / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()


def test_without_the_section_nothing_speaks_of_it(evaluated_recipe, read_metrics):
    run = lorakit.train(evaluated_recipe(evaluation=None)).output
    state = json.loads((run / "checkpoints/step-00000008/training_state.json").read_text())
    assert set(state) == {"step", "train", "optimizer", "precision", "data"}
    assert "evaluation" not in (run / "recipe.toml").read_text()
    assert not any(key.startswith("eval") for line in read_metrics(run) for key in line)


def test_a_steps_time_is_without_its_evaluation(evaluated_recipe, monkeypatch, read_metrics):
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
    run = lorakit.train(evaluated_recipe(evaluation={"every_steps": 1})).output
    monkeypatch.undo()
    lines = read_metrics(run)
    assert {m["step_seconds"] for m in lines if "loss" in m} == {1.0}
    assert {m["eval_seconds"] for m in lines if "eval_loss" in m} == {1000.0}
