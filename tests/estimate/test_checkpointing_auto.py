"""`activation_checkpointing = "auto"` is the fastest mode that fits."""

from __future__ import annotations

import math

import pytest
import torch
from attrs import evolve

import lorakit
from lorakit.cli import main
from lorakit.errors import RecipeError, UserError
from lorakit.estimate import check
from lorakit.estimate.check import GROWTH, TRUST
from lorakit.estimate.rehearsal import MicroBatch, with_checkpointing
from lorakit.estimate.report import report_on
from lorakit.estimate.room import Room
from lorakit.options import CHECKPOINTING_MODES
from lorakit.recipes import resolve_recipe
from lorakit.weights.base import open_base

CPU = torch.device("cpu")
BATCH = MicroBatch((40_000,) * 3, 30_000)
AUTO = {"activation_checkpointing": "auto", "max_steps": 1}


def room_for(total):
    """That which a run of so many bytes is chosen for."""
    available = math.ceil((total + GROWTH) / TRUST)
    return Room(available, available, "machine")


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
        monkeypatch.setattr(check, "room_on", lambda _, a=available: room_for(a))
        chosen = check.with_checkpointing_chosen(recipe, base, BATCH, CPU, precision)
        found.append(chosen.training.activation_checkpointing)
    assert found == [*CHECKPOINTING_MODES, "block"]


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_no_more_blocks_than_it_takes(mode, given, monkeypatch):
    recipe, base, precision = given

    def total(mode, blocks=0):
        variant = with_checkpointing(recipe, mode, blocks)
        known = {"device": CPU, "precision": precision, "room": None}
        return report_on(variant, base, BATCH, **known).estimate.total

    for blocks in (2, 5):
        available = (total(mode, blocks - 1) + total(mode, blocks)) // 2
        monkeypatch.setattr(check, "room_on", lambda _, a=available: room_for(a))
        chosen = check.with_checkpointing_chosen(recipe, base, BATCH, CPU, precision).training
        assert (chosen.activation_checkpointing, chosen.checkpointed_blocks) == (mode, blocks)


def test_a_limit_of_the_recipe_counts_where_it_is_lower(given, make_recipe, monkeypatch):
    for limit, available, room in ((1.5, 2**40, 1.5), (1.5, 2**30, 1.0), (0.0, 2**30, 1.0)):
        monkeypatch.setattr(check, "room_on", lambda _, a=available: Room(a, 2**41, "machine"))
        training = evolve(given[0].training, memory_limit=limit)
        found = check.room_for(evolve(given[0], training=training), CPU)
        assert found.available == room * 2**30
    with pytest.raises(UserError, match="this run cannot fit") as told:
        lorakit.train(make_recipe(training={"max_steps": 1, "memory_limit": 0.01}))
    assert "0.01 GiB" in str(told.value) or "10.24 MiB" in str(told.value)
    assert "training.memory_limit" in str(told.value)


def test_a_run_says_for_how_many_blocks(make_recipe, make_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(
        check,
        "with_checkpointing_chosen",
        lambda recipe, *_: with_checkpointing(recipe, "selective", 1),
    )
    model = make_checkpoint(num_hidden_layers=3)
    lorakit.train(make_recipe(model=model, training=AUTO, loggers=[{"name": "terminal"}]))
    said = capsys.readouterr().out
    assert "activation checkpointing: selective for 1 block, none for the others" in said


def test_a_number_of_blocks_is_one_of_a_mode(make_recipe):
    for mode in ("auto", "none", False):
        training = {"activation_checkpointing": mode, "checkpointed_blocks": 2}
        with pytest.raises(RecipeError, match="checkpointed_blocks needs activation_checkpointing"):
            resolve_recipe(make_recipe(training=training))


def test_the_comparison_has_a_row_for_a_number_of_blocks(make_recipe, make_checkpoint, capsys):
    training = {"activation_checkpointing": "selective", "checkpointed_blocks": 1}
    recipe = make_recipe(model=make_checkpoint(num_hidden_layers=3), training=training)
    with pytest.raises(SystemExit, match="0"):
        main(["estimate", recipe, "--compare"])
    own = [line for line in capsys.readouterr().out.splitlines() if "this recipe" in line]
    assert [line.split()[:3] for line in own] == [["none", "selective", "1"]]


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
