"""A run computes what its documents begin with in common once a micro-batch, to the same end."""

from __future__ import annotations

import pytest

from lorakit.assemble import assemble
from lorakit.progress import SilentProgress
from lorakit.recipes import resolve_recipe

SYSTEM = {
    "role": "system",
    "content": "Answer in one word, in French, whatever the question is.",
}
ONE_STEP_ROWS = {"batch_size": 6}


@pytest.fixture
def prompted_rows(make_rows):
    return [{"messages": [SYSTEM, *row["messages"]]} for row in make_rows(12)]


@pytest.mark.parametrize(
    "data", [{}, {"packed": True}, {"train_on_prompt": True}], ids=["rows", "packed", "prompt"]
)
def test_losses_are_those_without(data, prompted_rows, train_run, read_metrics):
    def losses(**training):
        run = train_run(prompted_rows, data=data, training={**ONE_STEP_ROWS, **training})
        keys = ("step", "epoch", "tokens", "trained_tokens")
        lines = read_metrics(run)
        return [line["loss"] for line in lines], [[line[key] for key in keys] for line in lines]

    shared, counts = losses(epochs=3)
    apart, expected = losses(epochs=3, share_prefixes=False)
    assert counts == expected
    assert shared == pytest.approx(apart, rel=1e-4)
    # Not only because neither shares.
    assert shared != apart


def test_fewer_tokens_are_computed(prompted_rows, make_recipe):
    def first_batch(**training):
        recipe = make_recipe(prompted_rows, training={**ONE_STEP_ROWS, **training})
        run = assemble(resolve_recipe(recipe), SilentProgress(), weights=False)
        return next(iter(run.plan.windows(0, 0)))[0]

    shared, apart = first_batch(), first_batch(share_prefixes=False)
    assert shared.size == apart.size == len(apart.tokens)
    assert len(shared.tokens) < 0.7 * len(apart.tokens)


def test_a_model_that_does_not_say_so_shares_nothing(prompted_rows, make_recipe, monkeypatch):
    from lorakit.modules import CausalDecoder

    monkeypatch.setattr(CausalDecoder, "shares_prefixes", False)
    recipe = resolve_recipe(make_recipe(prompted_rows, training=ONE_STEP_ROWS))
    run = assemble(recipe, SilentProgress(), weights=False)
    assert not run.plan.share_prefixes
    ((batch, *_), *_) = run.plan.windows(0, 0)
    assert len(batch.tokens) == batch.size
