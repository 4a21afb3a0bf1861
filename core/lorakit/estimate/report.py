"""What a recipe will take, put together and put into words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from attrs import evolve, frozen

from lorakit.estimate.limits import LARGEST, most_tokens_that_fit
from lorakit.estimate.peak import Estimate, Process, estimate_peak
from lorakit.estimate.process import settle
from lorakit.estimate.rehearsal import MicroBatch, Rehearsal, with_checkpointing
from lorakit.estimate.room import Room, resident_bytes
from lorakit.options import CHECKPOINTING_MODES, mode_text
from lorakit.protocols import BaseCheckpoint, Precision
from lorakit.recipes import Recipe, Section

MOST_REHEARSED = 2**13
"""Tokens in a rehearsal.  More take long, and memory grows evenly by then."""
COMPARED = ("base weights", "activations", "allocator")
"""Parts that quantization and activation checkpointing change most."""
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@frozen
class Report:
    """A recipe's memory, and what else would fit.

    Attributes:
        estimate: At the peak.
        process: What of it the process takes itself.
        batch: The micro-batch it is for.
        batch_rows: `training.batch_size`.
        room: The device's memory; None where it is not known.
        device: Where the run would be.
        largest_batch: Rows of the same length that fit; None where the room is not known.
        largest_length: Tokens a row that fit, with as many rows.
        mode: Of activation checkpointing.
        blocks: Of how many blocks that is; 0 for all.
    """

    estimate: Estimate
    process: Process
    batch: MicroBatch
    batch_rows: int
    room: Room | None
    device: torch.device
    largest_batch: int | None
    largest_length: int | None
    mode: str = "none"
    blocks: int = 0

    @property
    def fits(self) -> bool:
        return self.room is None or self.estimate.total <= self.room.available


@frozen
class Variant:
    """A row of the comparison.

    Attributes:
        quantization: Its name, or `none`.
        report: What it takes, in which mode of activation checkpointing.
        own: Whether it is the recipe as it is.
    """

    quantization: str
    report: Report
    own: bool


def report_on(
    recipe: Recipe,
    checkpoint: BaseCheckpoint,
    batch: MicroBatch,
    *,
    device: torch.device,
    precision: Precision,
    room: Room | None,
    limits: bool = True,
    process: Process | None = None,
) -> Report:
    """Estimates a recipe.

    Args:
        recipe: Resolved.
        checkpoint: The base model's files.
        batch: Its largest micro-batch.
        device: Where it would be.
        precision: Its dtypes.
        room: The device's memory.
        limits: Look for the largest batch and length, too.
        process: As measured before; None measures it.
    """
    settled = settle() if device.type == "cpu" else 0
    rehearsal = Rehearsal(recipe, checkpoint, device, precision)
    if process is None:
        # Now that what loads and quantizes has been imported.
        process = Process(resident_bytes(), settled) if device.type == "cpu" else Process(0, 0)
    found = estimate_peak(rehearsal, batch, device, process)
    training = recipe.training
    rows, mode = training.batch_size, str(training.activation_checkpointing)
    own = Report(
        found, process, batch, rows, room, device, None, None, mode, training.checkpointed_blocks
    )
    if room is None or not limits:
        return own
    share = batch.trained / batch.tokens

    @cache
    def peak(tokens: int) -> int:
        if tokens > MOST_REHEARSED:
            low, high = MOST_REHEARSED // 2, MOST_REHEARSED
            slope = (peak(high) - peak(low)) / (high - low)
            return int(peak(high) + slope * (tokens - high))
        length, over = divmod(tokens, rows)
        lengths = [n for n in (length + (row < over) for row in range(rows)) if n]
        sizes = MicroBatch(tuple(lengths), max(1, round(tokens * share)))
        return estimate_peak(rehearsal, sizes, device, process).total

    half = max(1, batch.tokens // 2)
    known = {batch.tokens: found.total, half: peak(half)}
    most = most_tokens_that_fit(peak, known, room.available)
    length = math.ceil(batch.tokens / rows)
    return evolve(own, largest_batch=most // length, largest_length=most // rows)


def compare(
    recipe: Recipe, checkpoint: BaseCheckpoint, batch: MicroBatch, own: Report, **known: Any
) -> list[Variant]:
    """The recipe with each quantization that is installed and with none, each with each mode of
    activation checkpointing.

    Args:
        recipe: Its activation checkpointing is chosen.
        checkpoint: The base model's files.
        batch: Its largest micro-batch.
        own: The recipe's own report, which is the row of its own setting.
        known: As `report_on` takes them.
    """
    chosen = recipe.quantization
    others = [Section(r, r.options()) for r in recipe.catalog.all("quantization")]
    sections = [s if chosen is None or s.name != chosen.name else chosen for s in others]
    rows = []
    for section in [None, *sections]:
        # Measured once for each: it grows by what estimating itself leaves behind.
        process = own.process if section == chosen else None
        name = section.name if section else "none"
        for mode in CHECKPOINTING_MODES:
            is_own = section == chosen and mode == recipe.training.activation_checkpointing
            if is_own:
                rows.append(Variant(name, own, own=True))
            # Of a number of blocks, the recipe's own is not what the mode takes for all.
            if own.blocks or not is_own:
                variant = evolve(with_checkpointing(recipe, mode), quantization=section)
                report = report_on(variant, checkpoint, batch, process=process, **known)
                process = report.process
                rows.append(Variant(name, report, own=False))
    return rows


def size_text(size: int) -> str:
    """Bytes for people: `3.85 GiB`."""
    for unit, name in UNITS:
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def table(report: Report) -> list[str]:
    """The parts, the sum, and what is there."""
    batch = report.batch
    lines = [
        f"memory at the peak, on {report.device}, for {len(batch.lengths):,} "
        f"document{'s' if len(batch.lengths) > 1 else ''} of {batch.tokens:,} tokens in all:"
    ]
    shown = [(part, size) for part, size in report.estimate.parts.items() if size]
    lines += [f"  {part:<22}{size_text(size):>12}" for part, size in shown]
    lines.append(f"  {'in all':<22}{size_text(report.estimate.total):>12}")
    lines.append(f"activation checkpointing: {mode_text(report.mode, report.blocks)}")
    return [*lines, *verdict(report)]


def verdict(report: Report) -> list[str]:
    """Whether it fits, and what would."""
    room = report.room
    if room is None:
        return ["how much memory there is, this system does not tell"]
    there = f"{size_text(room.available)} of {size_text(room.total)} ({room.source})"
    lines = [f"it {'fits' if report.fits else 'does not fit'}: available are {there}"]
    if report.largest_batch is not None and report.largest_length is not None:
        length = math.ceil(report.batch.tokens / report.batch_rows)
        rows = report.batch_rows
        more = " or more" if report.largest_length * rows > 0.9 * LARGEST else ""
        lines.append(
            f"largest batch_size with rows of {length:,} tokens: {report.largest_batch:,}{more}"
        )
        lines.append(
            f"longest rows with a batch_size of {rows:,}: {report.largest_length:,} tokens{more}"
        )
    return lines


def comparison_table(rows: Sequence[Variant]) -> list[str]:
    """A line for each variant: parts under the names they have in `table`, the sum of all others,
    and the same sum in all."""
    others = "others"
    lines = [
        f"{'quantization':<14}{'checkpointing':<13}"
        + "".join(f"{part:>14}" for part in (*COMPARED, others, "in all"))
        + "  fits"
    ]
    for row in rows:
        parts, total = row.report.estimate.parts, row.report.estimate.total
        compared = [parts[part] for part in COMPARED]
        sizes = [*compared, total - sum(compared), total]
        lines.append(
            f"{row.quantization:<14}{_short_mode(row.report):<13}"
            + "".join(f"{size_text(size):>14}" for size in sizes)
            + f"  {'yes' if row.report.fits else 'no'}{', this recipe' if row.own else ''}"
        )
    return lines


def _short_mode(report: Report) -> str:
    return f"{report.mode} {report.blocks}" if report.blocks else report.mode


def as_json(report: Report) -> dict[str, Any]:
    """For other programs; bytes."""
    room = report.room
    return {
        "device": str(report.device),
        "parts": dict(report.estimate.parts),
        "total": report.estimate.total,
        "available": room.available if room else None,
        "device_total": room.total if room else None,
        "fits": report.fits,
        "tokens": report.batch.tokens,
        "trained_tokens": report.batch.trained,
        "documents": len(report.batch.lengths),
        "activation_checkpointing": report.mode,
        "checkpointed_blocks": report.blocks,
        "largest_batch_size": report.largest_batch,
        "largest_length": report.largest_length,
    }
