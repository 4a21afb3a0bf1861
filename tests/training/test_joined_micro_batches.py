"""Small micro-batches of an optimizer step are computed as one, to the same end."""

from __future__ import annotations

import pytest

import lorakit
from lorakit.assemble import assemble
from lorakit.progress import SilentProgress
from lorakit.recipes import resolve_recipe

SMALL = {"gradient_accumulation_steps": 6, "epochs": 2}


def numbers(run, read_metrics):
    keys = ("step", "epoch", "tokens", "trained_tokens")
    lines = read_metrics(run)
    return [line["loss"] for line in lines], [[line[key] for key in keys] for line in lines]


@pytest.mark.parametrize("data", [{}, {"packed": True, "max_seq_len": 200}], ids=["rows", "packed"])
def test_losses_are_those_of_micro_batches_apart(data, make_rows, train_run, read_metrics):
    rows = make_rows(20)

    def run(**training):
        found = train_run(rows, data=data, training={**SMALL, **training})
        return numbers(found, read_metrics)

    together, counts = run()
    apart, expected = run(join_micro_batches=False)
    assert counts == expected
    assert together == pytest.approx(apart, rel=1e-4)


def windows(recipe, **training):
    overrides = {f"training.{key}": value for key, value in {**SMALL, **training}.items()}
    run = assemble(resolve_recipe(recipe, overrides=overrides), SilentProgress(), weights=False)
    return list(run.plan.windows(0, 0))


def test_no_micro_batch_is_larger_than_the_largest_was(make_rows, make_recipe):
    recipe = make_recipe(make_rows(30))
    together, apart = windows(recipe), windows(recipe, join_micro_batches=False)
    count = sum(map(len, together))
    assert count < sum(map(len, apart)) == 30
    largest = max((batch for window in apart for batch in window), key=lambda batch: batch.size)
    joined = [batch for window in together for batch in window if batch.joined > 1]
    assert joined
    assert all(batch.size <= largest.size for batch in joined)
    assert all(batch.trained <= largest.trained for batch in joined)


def test_a_run_goes_on_with_them_or_without(make_rows, make_recipe, train_run, read_metrics):
    """What a checkpoint counts are the recipe's micro-batches."""
    rows, schedule = make_rows(20), {"name": "constant"}
    whole = train_run(rows, training=SMALL, schedule=schedule)
    expected, expected_counts = numbers(whole, read_metrics)
    recipe = make_recipe(rows, training=SMALL, schedule=schedule)
    lorakit.train(recipe, overrides={"training.max_steps": 3})
    apart = {"training.join_micro_batches": False}
    resumed = lorakit.train(recipe, overrides=apart, resume=True)
    losses, counts = numbers(resumed.output, read_metrics)
    assert counts == expected_counts
    assert losses == pytest.approx(expected, rel=1e-4)
