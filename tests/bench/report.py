"""docs/performance.md's tables and plots, from the results file alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.parts import (
    COMPILED,
    LENGTHS,
    LIMIT_PRODUCTS,
    LIMIT_STEP,
    MEMORY_LENGTHS,
    TURNS,
    row_time,
    rows_together,
)
from tests.bench.processes import ROOT
from tests.bench.results import (
    WARM_UP,
    rates,
    step_tokens,
    succeeded,
    tokens_per_second,
    trained_share,
)
from tests.bench.targets import (
    DORA_OVERHEAD,
    FLAT_WITHIN,
    GEMM_FRACTION,
    LONG,
    QLORA,
    SHORT,
    STARTUP_SECONDS,
    Target,
    chosen,
    ratios,
)

Results = Mapping[str, Any]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin, by python -m tests.bench -->", "<!-- figures: end -->"


def write(results: Results, page: Path = PAGE) -> None:
    """Puts the figures between the page's two marks; what is around them stays."""
    from tests.bench import plots

    images = plots.draw(results, page.parent / "performance")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{page} has no {BEGIN!r} and {END!r} to write between")
    page.write_text(
        f"{before}{BEGIN}\n\n{figures(results, images)}\n{END}{after}", encoding="utf-8"
    )


def figures(results: Results, images: Mapping[str, str]) -> str:
    """All sections that there are results for.

    Args:
        results: As in the file.
        images: Of plots by section, relative to the page.
    """
    sections: dict[str, Iterable[str]] = {
        "Where and when": sittings(results),
        "Against the peers": against_peers(results),
        "Against the machine's limit": against_the_limit(results),
        "QLoRA": compared(results, QLORA),
        "Long context": compared(results, *([target] for target in LONG.values())),
        "What each technique does": ablation(results),
        "How cost grows": scaling(results),
        "DoRA": dora(results),
        "Start-up": startup(results),
    }
    text = []
    for title, lines in sections.items():
        body = "\n".join(lines)
        if body:
            image = f"\n![{title}]({images[title]})\n" if title in images else ""
            text.append(f"## {title}\n\n{body}\n{image}")
    return "\n".join(text)


# ---------------------------------------------------------------- pieces of text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    body = list(rows)
    if body:
        yield f"| {' | '.join(heads)} |"
        yield f"|{' --- |' * len(heads)}"
        yield from (f"| {' | '.join(row)} |" for row in body)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def brief(run: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    if "failed" in run:
        return f"failed: {run['failed']}"
    if "steps" not in run:
        return ", ".join(f"{seconds:.2f} s" for seconds in run["seconds"])
    peak = f", {gigabytes(run['peak_bytes'])} GB" if "peak_bytes" in run else ""
    return f"{tokens_per_second(run):.1f} tokens/s{peak}"


def of_part(results: Results, part: str) -> dict[str, Mapping[str, Any]]:
    """The part's runs, in the order they were made."""
    runs = [(n, r) for n, r in results["runs"].items() if r["part"] == part]
    return dict(sorted(runs, key=lambda item: item[1]["order"]))


def run_row(name: str, run: Mapping[str, Any]) -> list[str]:
    if "failed" in run:
        # What a library wrote may hold the table's own mark.
        reason = run["failed"].replace("|", "/")
        return [name, f"failed: {reason}", "", "", "", ""]
    pace = rates(run)
    spread = f"{min(pace):.1f} to {max(pace):.1f}" if len(pace) > 1 else "one step"
    return [
        name,
        f"{tokens_per_second(run):.1f}",
        spread,
        f"{step_tokens(run):,.0f}",
        f"{trained_share(run):.0%}",
        gigabytes(run["peak_bytes"]) if "peak_bytes" in run else "",
    ]


RUN_HEADS = ("run", "tokens/s", "slowest to fastest step", "tokens a step", "trained", "peak GB")


def target_table(results: Results, targets: Sequence[Target]) -> Iterator[str]:
    """Of the one setting that meets most of them."""
    ours = chosen(results, targets)
    rows = []
    for target in targets:
        found = ratios(results, target, ours) if ours else None
        if found is None:
            continue
        faster, smaller = found
        rows.append(
            [
                target.peer,
                f"{faster:.2f} x",
                f"at least {target.faster:g} x: {verdict(faster >= target.faster)}",
                f"{smaller:.2f} x",
                f"at most {target.smaller:g} x: {verdict(smaller <= target.smaller)}",
            ]
        )
    if rows:
        yield f"\n**{ours}** against:\n"
    yield from table(("peer", "tokens/s", "target", "peak memory", "target"), rows)


# ---------------------------------------------------------------- sections


def sittings(results: Results) -> Iterator[str]:
    """One line a part, and machine and versions once where all parts agree."""
    parts = results["sittings"]
    yield from table(
        ("part", "date", "commit", "counted steps", "minutes"),
        [
            [p, s["date"], s["commit"], str(s["steps"]), f"{s['seconds'] / 60:.1f}"]
            for p, s in parts.items()
        ],
    )
    for title, key in (("Machine", "machine"), ("Versions", "versions")):
        kinds: dict[str, list[str]] = {}
        for part, one in parts.items():
            # Parts without peers name fewer versions; they are told with those that agree.
            wider = [o[key] for o in parts.values() if one[key].items() <= o[key].items()]
            kinds.setdefault(described(max(wider, key=len)), []).append(part)
        for text, of in kinds.items():
            which = "" if len(kinds) == 1 else f" ({', '.join(of)})"
            yield f"\n{title}{which}: {text}."


def described(values: Mapping[str, Any]) -> str:
    shown = {k.removesuffix("_bytes"): v for k, v in values.items()}
    if "memory" in shown:
        shown["memory"] = f"{gigabytes(shown['memory'])} GB"
    return ", ".join(f"{name} {value}" for name, value in sorted(shown.items()))


def against_peers(results: Results) -> Iterator[str]:
    runs = of_part(results, "peers")
    if not runs:
        return
    yield from table(RUN_HEADS, [run_row(name, run) for name, run in runs.items()])
    yield from target_table(results, SHORT)


def compared(results: Results, *kinds: Sequence[Target]) -> Iterator[str]:
    """A part's runs, and what they come to against each kind's targets."""
    names = {target.peer for targets in kinds for target in targets}
    for part in {run["part"] for name, run in results["runs"].items() if name in names}:
        rows = [run_row(name, run) for name, run in of_part(results, part).items()]
        yield from table(RUN_HEADS, rows)
        for targets in kinds:
            yield from target_table(results, targets)


def against_the_limit(results: Results) -> Iterator[str]:
    if not (succeeded(results, LIMIT_STEP) and succeeded(results, LIMIT_PRODUCTS)):
        return
    step, products = results["runs"][LIMIT_STEP], results["runs"][LIMIT_PRODUCTS]
    pace, limit = tokens_per_second(step), tokens_per_second(products)
    yield (
        f"A step of {step_tokens(step):,.0f} tokens, checkpointing off: {pace:.1f} tokens/s. Its "
        f"matrix products alone: {limit:.1f} tokens/s. That is {pace / limit:.0%} of the limit "
        f"(target: at least {GEMM_FRACTION:.0%}): {verdict(pace / limit >= GEMM_FRACTION)}."
    )
    # Runs of earlier commits have none.
    if all("torch_seconds" in each for each in products["steps"]):
        steps = [{**each, "seconds": each["torch_seconds"]} for each in products["steps"]]
        by_torch = tokens_per_second({**products, "steps": steps})
        yield ""
        yield (
            f"By the fastest of torch's libraries the products alone make {by_torch:.1f} tokens/s: "
            f"the step is at {pace / by_torch:.0%} of that."
        )


def ablation(results: Results) -> Iterator[str]:
    runs = of_part(results, "ablation")
    whole = runs.get("ablation: all on", {})
    rows = []
    for name, run in runs.items():
        row = run_row(name.removeprefix("ablation: "), run)
        if "steps" in run and "steps" in whole:
            pace = tokens_per_second(run) / tokens_per_second(whole)
            memory = run["peak_bytes"] / whole["peak_bytes"]
            row += [f"{pace:.2f} x", f"{memory:.2f} x"]
        else:
            row += ["", ""]
        rows.append(row)
    yield from table((*RUN_HEADS, "tokens/s", "memory"), rows)
    compiled = runs.get(f"ablation: {COMPILED}", {})
    if "steps" in compiled and "steps" in whole:
        first, usual = (run["steps"][0]["seconds"] for run in (compiled, whole))
        yield (
            f"\nWith `training.compile`, from a cold cache, the first step took {first:.1f} s; "
            f"without, {usual:.1f} s."
        )


def scaling(results: Results) -> Iterator[str]:
    times, together = time_curve(results), time_curve_together(results)
    apart = time_curve(results, shared=False)
    yield from table(
        (
            "tokens a row",
            "ms a token, a row a micro-batch",
            "beginnings in common computed for each document",
            f"{LENGTHS[-1]:,} tokens a micro-batch",
        ),
        [
            [f"{n:,}", f"{ms:.3f}", milliseconds(apart.get(n)), milliseconds(together.get(n))]
            for n, ms in times.items()
        ],
    )
    if len(times) == len(LENGTHS):
        spread = max(times.values()) / min(times.values()) - 1
        yield (
            f"\nA row a micro-batch, the slowest is {spread:.0%} above the fastest "
            f"(target: within {FLAT_WITHIN:.0%}): {verdict(spread <= FLAT_WITHIN)}.\n"
        )
    if len(apart) == len(LENGTHS):
        spread = max(apart.values()) / min(apart.values()) - 1
        yield (
            "The longer a row, the more of its documents' beginnings are computed once. With each "
            f"computed for itself, the slowest is {spread:.0%} above the fastest.\n"
        )
    if len(together) == len(LENGTHS):
        spread = max(together.values()) / min(together.values()) - 1
        yield (
            f"Rows of a micro-batch are one sequence to the model: with {LENGTHS[-1]:,} tokens in "
            f"each, the slowest is {spread:.0%} above the fastest.\n"
        )
    memory = memory_curve(results)
    if len(memory) < 3:
        return
    slope, start = line_through(memory)
    yield from table(
        ("tokens a row, checkpointing on", "peak GB", "on the straight line"),
        [[f"{n:,}", gigabytes(peak), gigabytes(start + slope * n)] for n, peak in memory.items()],
    )
    off = max(abs(peak - start - slope * n) / peak for n, peak in memory.items())
    yield (
        f"\nThe line is {gigabytes(start)} GB and {slope / 1e3:.0f} kB a token; no run is further "
        f"than {off:.1%} from it."
    )


def time_curve(results: Results, *, shared: bool = True) -> dict[int, float]:
    """Milliseconds a token, by tokens a row: of the turns together."""
    curve = {}
    for n in LENGTHS:
        named = [row_time(n, turn, shared=shared) for turn in TURNS]
        names = [name for name in named if succeeded(results, name)]
        if names:
            found = [rate for name in names for rate in rates(results["runs"][name])]
            curve[n] = 1e3 / statistics.median(found)
    return curve


def time_curve_together(results: Results) -> dict[int, float]:
    """Likewise, where all micro-batches are of as many tokens as the longest row."""
    longest = LENGTHS[-1]
    names = {n: rows_together(n) for n in LENGTHS[:-1]}
    curve = {
        n: 1e3 / tokens_per_second(results["runs"][name])
        for n, name in names.items()
        if succeeded(results, name)
    }
    alone = time_curve(results)
    return curve | ({longest: alone[longest]} if longest in alone else {})


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def memory_curve(results: Results) -> dict[int, float]:
    """Peak bytes, by tokens a row."""
    names = {n: f"memory: {n:,} tokens a row" for n in MEMORY_LENGTHS}
    return {n: results["runs"][m]["peak_bytes"] for n, m in names.items() if succeeded(results, m)}


def line_through(points: Mapping[int, float]) -> tuple[float, float]:
    """Slope and start of the least-squares line."""
    fit = statistics.linear_regression(list(points), list(points.values()))
    return fit.slope, fit.intercept


def dora(results: Results) -> Iterator[str]:
    names = "adapter: LoRA", "adapter: DoRA"
    if not all(succeeded(results, name) for name in names):
        return
    runs = [results["runs"][name] for name in names]
    yield from table(RUN_HEADS, [run_row(*row) for row in zip(names, runs, strict=True)])
    # Of the two steps beside each other, over the same rows.
    pairs = zip(*(run["steps"][WARM_UP:] for run in runs), strict=True)
    overhead = statistics.median(d["seconds"] / plain["seconds"] for plain, d in pairs) - 1
    yield (
        f"\nA step with DoRA takes {overhead:.1%} more time than one with LoRA "
        f"(target: under {DORA_OVERHEAD:.0%}): {verdict(overhead < DORA_OVERHEAD)}."
    )


def startup(results: Results) -> Iterator[str]:
    run = results["runs"].get("start-up", {})
    if "seconds" not in run:
        return
    middle = statistics.median(run["seconds"])
    each = ", ".join(f"{seconds:.2f}" for seconds in run["seconds"])
    yield (
        f"From the command to the first step, model and data in the cache: {middle:.2f} s "
        f"(runs: {each}; target: under {STARTUP_SECONDS:g} s): "
        f"{verdict(middle < STARTUP_SECONDS)}."
    )
