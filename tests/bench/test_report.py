"""Tables and plots come from the results file, and say what was lost as well as what was won."""

from __future__ import annotations

import re

import pytest

from tests.bench import report, results
from tests.bench.__main__ import parser
from tests.bench.targets import chosen

OURS, OTHER = "lorakit: packed 2,048", "lorakit: packed 1,024, checkpointing on"
TRL = "TRL, packed 4 x 512"


def run(part, order, seconds, gigabytes, tokens=1000):
    """Three steps, of which the first would change every median it counted in."""
    steps = [
        {"seconds": s, "tokens": tokens, "trained_tokens": tokens // 2}
        for s in (50 * seconds, seconds, seconds * 1.5)
    ]
    return {"part": part, "order": order, "steps": steps, "peak_bytes": gigabytes * 1e9}


@pytest.fixture
def found():
    one = {
        "date": "2026-01-02 03:04 UTC",
        "commit": "abc1234",
        "steps": 2,
        "seconds": 90,
        "machine": {"cpu": "a CPU", "memory_bytes": 16e9},
        "versions": {"torch": "2.13.0"},
    }
    with_peers = one | {"versions": {"torch": "2.13.0", "trl": "1.0"}}
    runs = {
        TRL: run("peers", 0, 20.0, 8.0),
        OURS: run("peers", 1, 4.0, 3.0),
        OTHER: run("peers", 2, 8.0, 2.0),
        "TRL nf4, padded batches of 4": {"part": "qlora", "order": 3, "failed": "killed | KILL"},
        "limit: step": run("limit", 4, 4.0, 3.0),
        "limit: matrix products": run("limit", 5, 3.0, 0),
        "ablation: all on": run("ablation", 6, 4.0, 2.0),
        "ablation: compile on": run("ablation", 7, 2.0, 3.0),
        "adapter: LoRA": run("dora", 8, 4.0, 2.0),
        "adapter: DoRA": run("dora", 9, 5.0, 2.0),
        "start-up": {"part": "startup", "order": 10, "seconds": [7.0, 5.0, 5.5]},
    }
    del runs["limit: matrix products"]["peak_bytes"]
    for n in (256, 512, 1024, 2048):
        for turn in (1, 2):
            name = f"time: {n:,} tokens a row, turn {turn}"
            runs[name] = run("scaling", n + turn, n / 100, 1.0, tokens=n)
            name += ", beginnings for each document"
            runs[name] = run("scaling", n + turn, n / (99 if n == 256 else 90), 1.0, tokens=n)
    for rows, n in ((8, 256), (4, 512), (2, 1024)):
        runs[f"time: {rows} rows of {n:,} tokens"] = run("scaling", 2048, 20.48, 1.0, tokens=2048)
    for n in (1024, 2048, 8192):
        runs[f"memory: {n:,} tokens a row"] = run("scaling", 9000 + n, 1.0, 1 + n / 1000)
    return {"sittings": {"peers": with_peers, "limit": one}, "runs": runs}


def test_figures_are_medians_after_the_first_step(found):
    text = report.figures(found, {})
    # 1000 tokens in 4 s and in 6 s.
    assert f"| {OURS} | 208.3 | 166.7 to 250.0 | 1,000 | 50% | 3.00 |" in text


def test_won_and_lost_are_told_apart(found):
    text = report.figures(found, {})
    assert f"| {TRL} | 5.00 x | at least 4 x: met | 0.38 x | at most 0.33 x: **not met** |" in text
    assert "| TRL nf4, padded batches of 4 | failed: killed / KILL |" in text
    assert "That is 75% of the limit (target: at least 70%): met." in text
    assert "| compile on | 416.7 | 333.3 to 500.0 | 1,000 | 50% | 3.00 | 2.00 x | 1.50 x |" in text
    assert "from a cold cache, the first step took 100.0 s; without, 200.0 s." in text
    assert "takes 25.0% more time than one with LoRA (target: under 10%): **not met**" in text
    assert "5.50 s (runs: 7.00, 5.00, 5.50; target: under 6 s): met" in text
    assert "the slowest is 0% above the fastest (target: within 20%): met" in text
    assert "with 2,048 tokens in each, the slowest is 0% above the fastest" in text
    assert "| 256 | 12.000 | 12.121 | 12.000 |" in text
    assert "With each computed for itself, the slowest is 10% above the fastest" in text
    assert "1.00 GB and 1000 kB a token; no run is further than 0.0% from it" in text


def test_versions_are_told_once_and_machines_apart(found):
    assert "\nVersions: torch 2.13.0, trl 1.0.\n" in report.figures(found, {})
    found["sittings"]["limit"] = found["sittings"]["limit"] | {"machine": {"cpu": "another"}}
    text = report.figures(found, {})
    assert "Machine (peers): cpu a CPU, memory 16.00 GB." in text
    assert "Machine (limit): cpu another." in text


def test_the_setting_that_meets_most_is_chosen_then_the_fastest(found):
    # One target each: throughput and memory.
    assert chosen(found) == OURS
    found["runs"][OTHER] = run("peers", 2, 5.0, 2.0)
    assert chosen(found) == OTHER
    assert chosen({"runs": {}}) is None


def test_only_what_is_between_the_marks_is_replaced(found, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    report.write(found, page)
    once = page.read_text()
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "stale" not in once
    images = re.findall(r"!\[.*\]\((.+)\)", once)
    assert len(images) == 3
    drawings = [(tmp_path / image).read_bytes() for image in images]
    report.write(found, page)
    assert page.read_text() == once
    assert [(tmp_path / image).read_bytes() for image in images] == drawings


def test_nothing_measured_gives_no_table():
    assert report.figures({"sittings": {}, "runs": {}}, {}) == ""


def test_results_are_kept_as_they_are(found, tmp_path):
    results.save(found, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == found


def test_the_commands_of_the_page_are_there():
    page = report.PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^python -m (tests\.bench\S*)(.*)$", page, re.MULTILINE)
    assert len(commands) >= 8
    for module, arguments in commands:
        file = report.ROOT.joinpath(*module.split("."))
        assert file.is_dir() or file.with_suffix(".py").is_file(), module
        if file.is_dir():
            parser().parse_args(arguments.split())


def test_two_runs_of_a_peer_count_as_one():
    fast, slow = run("peers", 0, 10.0, 5.0), run("peers", 7, 20.0, 6.0)
    both = results.pooled(fast, slow)
    assert sorted(results.rates(both)) == sorted([*results.rates(fast), *results.rates(slow)])
    assert (both["peak_bytes"], both["order"]) == (6e9, 0)
    failed = {"failed": "killed"}
    assert results.pooled(failed, slow) == slow == results.pooled(slow, failed)
