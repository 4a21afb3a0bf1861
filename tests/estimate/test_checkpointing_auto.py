"""`activation_checkpointing = "auto"` is the fastest mode that fits."""

from __future__ import annotations

import pytest
import torch

import lorakit
from lorakit.cli import main
from lorakit.estimate import check
from lorakit.estimate.rehearsal import MicroBatch, with_checkpointing
from lorakit.estimate.report import report_on
from lorakit.estimate.room import Room
from lorakit.options import CHECKPOINTING_MODES
from lorakit.recipes import resolve_recipe
from lorakit.weights.base import open_base

CPU = torch.device("cpu")
BATCH = MicroBatch((40_000,) * 3, 30_000)
AUTO = {"activation_checkpointing": "auto", "max_steps": 1}


@pytest.fixture
def given(make_recipe, make_checkpoint):
    recipe = resolve_recipe(make_recipe(model=make_checkpoint(num_hidden_layers=8), training=AUTO))
    base = open_base(recipe.output.__class__(recipe.model.options.path), recipe.catalog)
    precision = recipe.precision.record.resolve(CPU, recipe.precision.options)
    return recipe, base, precision


def test_each_room_gets_the_fastest_that_fits(given, monkeypatch):
    recipe, base, precision = given
    totals = {
        mode: report_on(
            with_checkpointing(recipe, mode),
            base,
            BATCH,
            device=CPU,
            precision=precision,
            room=None,
        ).estimate.total
        for mode in CHECKPOINTING_MODES
    }
    # From the fastest to the smallest.
    assert list(totals.values()) == sorted(totals.values(), reverse=True)
    found = []
    gaps = (totals["none"] - totals["selective"], totals["selective"] - totals["block"])
    margin = min(gaps) // 4
    for available in (*(total + margin for total in totals.values()), 0):
        monkeypatch.setattr(check, "room_on", lambda _, a=available: Room(a, a, "machine"))
        chosen = check.with_checkpointing_chosen(recipe, base, BATCH, CPU, precision)
        found.append(chosen.training.activation_checkpointing)
    assert found == [*CHECKPOINTING_MODES, "block"]


def test_where_there_is_room_or_none_is_known_nothing_is_computed_twice(given, monkeypatch):
    recipe, base, precision = given
    for room in (None, Room(2**50, 2**50, "machine")):
        monkeypatch.setattr(check, "room_on", lambda _, room=room: room)
        chosen = check.with_checkpointing_chosen(recipe, base, BATCH, CPU, precision)
        assert chosen.training.activation_checkpointing == "none"


def test_a_run_says_what_it_chose_and_its_recipe_still_leaves_it_open(
    make_recipe, monkeypatch, capsys
):
    monkeypatch.setattr(
        check,
        "with_checkpointing_chosen",
        lambda recipe, *_: with_checkpointing(recipe, "selective"),
    )
    loggers = [{"name": "terminal"}, {"name": "disk"}]
    run = lorakit.train(make_recipe(training=AUTO, loggers=loggers)).output
    assert "activation checkpointing: selective, the fastest that fits" in capsys.readouterr().out
    assert 'activation_checkpointing = "auto"' in (run / "recipe.toml").read_text()


def test_it_can_be_estimated(make_recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["estimate", make_recipe(training=AUTO)])
    assert "memory at the peak" in capsys.readouterr().out
