"""The plots of docs/performance.md, as SVG files that change only with the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.bench.report import line_through, memory_curve, of_part, time_curve
from tests.bench.results import tokens_per_second

OURS, THEIRS = "#2a6f97", "#b8b8b8"


def draw(results: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Draws what there are results for.

    Returns:
        Paths relative to the directory's parent, by the title of the section they belong to.
    """
    # Without these, each drawing has names and a date of its own.
    matplotlib.rcParams["svg.hashsalt"] = "lorakit"
    directory.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for title, name, figure in (
        ("Against the peers", "peers", bars(results, "peers")),
        ("Long context", "long", bars(results, "long")),
        ("What each technique does", "ablation", bars(results, "ablation")),
        ("How cost grows", "scaling", curves(results)),
    ):
        if figure is None:
            continue
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
        drawn[title] = f"{directory.name}/{name}.svg"
    return drawn


def bars(results: Mapping[str, Any], part: str) -> Any:
    """Tokens per second and peak memory, a bar a run."""
    runs = {n: r for n, r in of_part(results, part).items() if "steps" in r}
    if not runs:
        return None
    names = [name.removeprefix("ablation: ") for name in runs]
    ours = [part == "ablation" or name.startswith("lorakit") for name in runs]
    colors = [OURS if mine else THEIRS for mine in ours]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.8 + 0.32 * len(runs)), sharey=True, layout="constrained"
    )
    for axes, label, values in (
        (left, "tokens/s", [tokens_per_second(run) for run in runs.values()]),
        (right, "peak memory, GB", [run["peak_bytes"] / 1e9 for run in runs.values()]),
    ):
        shown = axes.barh(names, values, color=colors)
        axes.bar_label(shown, fmt="%.1f", padding=2, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    return figure


def curves(results: Mapping[str, Any]) -> Any:
    """Time a token and peak memory over tokens a row."""
    times, memory = time_curve(results), memory_curve(results)
    if len(times) < 2 or len(memory) < 2:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.plot(list(times), list(times.values()), "o-", color=OURS)
    left.set_xscale("log", base=2)
    left.set_xticks(list(times), [f"{n:,}" for n in times])
    left.set_ylim(bottom=0)
    left.set_ylabel("ms a token")
    slope, start = line_through(memory)
    right.plot(list(memory), [start / 1e9 + slope * n / 1e9 for n in memory], color=THEIRS)
    right.plot(list(memory), [peak / 1e9 for peak in memory.values()], "o", color=OURS)
    right.set_ylim(bottom=0)
    right.set_ylabel("peak memory, GB (checkpointing on)")
    for axes in (left, right):
        axes.set_xlabel("tokens a row")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
