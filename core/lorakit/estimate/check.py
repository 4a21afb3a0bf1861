"""Estimates as commands ask for them: before a run starts, and on their own."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, cast

import torch
from torch import nn

from lorakit.base_model import build_on_meta, resolve_device
from lorakit.errors import UserError
from lorakit.estimate.rehearsal import MicroBatch, with_checkpointing
from lorakit.estimate.report import Report, Variant, compare, report_on, table
from lorakit.estimate.room import Room, room_on
from lorakit.estimate.subject import (
    measured_micro_batch,
    open_shapes,
    worst_micro_batch,
)
from lorakit.kernels import choose_kernels
from lorakit.options import AUTO, CHECKPOINTING_MODES, faster_mode
from lorakit.progress import TerminalProgress
from lorakit.protocols import BaseCheckpoint, CausalLM, Precision
from lorakit.recipes import Recipe
from lorakit.runtime import tune_process

LIMIT = "training.memory_limit"
TRUST = 0.92
"""Share of what is there that choosing fills: estimates were up to 7% too low."""
GROWTH = 2**25
"""Bytes that choosing is left: estimating itself has a process grow, by 14 MiB for the eight
estimates that a model of 30 blocks may take."""
GENEROUS = 8
"""Times what a linear layer reads and writes: more than any training keeps of it."""
SPARE = 2**30


def check_that_it_fits(
    recipe: Recipe,
    base: BaseCheckpoint,
    batch: MicroBatch,
    device: torch.device,
    precision: Precision,
) -> None:
    """Refuses a run whose peak, with `batch` as its largest micro-batch, is more than the device
    has.

    Raises:
        UserError: With the estimate's table.
    """
    room = room_for(recipe, device)
    if room is None or _surely_fits(recipe, base, batch.tokens, room.available):
        return
    report = report_on(
        recipe,
        base,
        batch,
        device=device,
        precision=precision,
        room=room,
        limits=False,
    )
    if not report.fits:
        raise UserError(
            "\n".join(["this run cannot fit in memory", *table(report)]),
            "`lorakit estimate --compare` shows what would; --no-memory-check starts it anyway.",
        )


def with_checkpointing_chosen(
    recipe: Recipe,
    base: BaseCheckpoint,
    batch: MicroBatch,
    device: torch.device,
    precision: Precision,
) -> Recipe:
    """The recipe with `training.activation_checkpointing = "auto"` replaced by the fastest mode
    that fits, for as few blocks as do; by the one that takes the least memory, where none fits."""
    if recipe.training.activation_checkpointing != AUTO:
        return recipe
    room = room_for(recipe, device)
    fastest = with_checkpointing(recipe, CHECKPOINTING_MODES[0])
    if room is None or _surely_fits(recipe, base, batch.tokens, room.available):
        return fastest
    known: dict[str, Any] = {"device": device, "precision": precision, "room": room}

    def total(mode: str, blocks: int = 0) -> int:
        variant = with_checkpointing(recipe, mode, blocks)
        report = report_on(variant, base, batch, limits=False, **known)
        known["process"] = report.process
        return report.estimate.total

    # A limit of the recipe's is what to plan with; more than the system has ends the run.
    limited = room.source == LIMIT
    available = int(room.available * (1 if limited else TRUST)) - GROWTH
    totals: dict[str, int] = {}
    for mode in CHECKPOINTING_MODES:
        totals[mode] = total(mode)
        if totals[mode] <= available:
            break
    else:
        return with_checkpointing(recipe, min(totals, key=lambda mode: totals[mode]))
    if mode == faster_mode(mode):
        return fastest
    model = build_on_meta(recipe.model.record, base.config, recipe.model.options)
    counts = range(1, len(cast(CausalLM, model).blocks))
    index = bisect_left(counts, True, key=lambda count: total(mode, count) <= available)
    return with_checkpointing(recipe, mode, counts[index] if index < len(counts) else 0)


def room_for(recipe: Recipe, device: torch.device) -> Room | None:
    """The device's memory, or what the recipe's limit leaves of it."""
    room, limit = room_on(device), int(recipe.training.memory_limit * 2**30)
    if not limit or (room is not None and room.available <= limit):
        return room
    return Room(limit, limit if room is None else room.total, LIMIT)


def estimate_recipe(
    recipe: Recipe, *, use_data: bool = True, comparison: bool = False
) -> tuple[Report, list[Variant]]:
    """A recipe's estimate and, if asked for, those of its variants.

    Args:
        recipe: Resolved.
        use_data: Look for the largest micro-batch of the data, if they are on this machine;
            else every row is taken to be as long as it may be.
        comparison: Estimate variants, too.

    Raises:
        UserError: The machine lacks the device, or the model or the data are wrong.
    """
    progress = TerminalProgress()
    device = resolve_device(recipe.run.device)
    precision = recipe.precision.record.resolve(device, recipe.precision.options)
    choose_kernels(recipe.training.kernels, recipe.catalog, device)
    tune_process(device)
    base = open_shapes(recipe, progress)
    batch = measured_micro_batch(recipe, base, progress) if use_data else None
    batch = batch or worst_micro_batch(recipe)
    recipe = with_checkpointing_chosen(recipe, base, batch, device, precision)
    known: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "room": room_for(recipe, device),
    }
    report = report_on(recipe, base, batch, **known)
    rows = compare(recipe, base, batch, report, limits=False, **known) if comparison else []
    return report, rows


def _surely_fits(recipe: Recipe, base: BaseCheckpoint, tokens: int, available: int) -> bool:
    """Whether a bound that costs nothing is enough: most runs are far from any limit."""
    model = build_on_meta(recipe.model.record, base.config, recipe.model.options)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    widths = sum(m.in_features + m.out_features for m in linears)
    weights = 4 * sum(p.numel() for p in model.parameters())
    return 2 * weights + 4 * GENEROUS * widths * tokens + SPARE < available
