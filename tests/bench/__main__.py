"""lorakit's figures: against its peers, against the machine's limit, and how they scale.

    python -m tests.bench                       all of it: half an hour or more on two cores
    python -m tests.bench --only peers          one part; the rest of the results stays
    python -m tests.bench --report              tables and plots from the results there are

Needs `pip install '.[bench]' ./plugins/lorakit-*`.  Writes docs/performance/results.json, the
plots beside it, and the tables of docs/performance.md.  Each run is a process of its own, one
after the other; do nothing else with the machine meanwhile.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.bench import report, results
from tests.bench.inputs import Inputs
from tests.bench.parts import PARTS, WITH_PEERS
from tests.bench.processes import RunFailed


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--only", action="append", choices=PARTS, help="a part; repeatable")
    made.add_argument("--run", default="", help="of these parts, only runs with this in their name")
    made.add_argument("--steps", type=int, default=2, help="counted steps, after one to warm up")
    made.add_argument("--peers-python", type=Path, help="a Python that has TRL and PEFT")
    made.add_argument("--results", type=Path, default=results.FILE, help="the JSON file")
    made.add_argument("--report", action="store_true", help="measure nothing")
    return made


def measure(part: str, inputs: Inputs, steps: int, file: Path, name: str = "") -> int:
    """Makes the runs of a part; each is saved as soon as it is done.

    Args:
        part: One of `PARTS`.
        inputs: The model and the rows.
        steps: Counted ones.
        file: The results.
        name: Only runs with this in their name; date and commit stay those of the others.

    Returns:
        How many it made.
    """
    found = results.load(file)
    peers = inputs.peers_python if part in WITH_PEERS else None
    if not name:
        found["sittings"][part] = results.sitting(steps, peers)
    began = time.perf_counter()
    made = 0
    orders = {n: r["order"] for n, r in found["runs"].items()}
    found["runs"] = {n: r for n, r in found["runs"].items() if r["part"] != part or name not in n}
    # What runs depends on `found`: a part may go by the results of the parts before it.
    for variant in PARTS[part](inputs, steps + results.WARM_UP, found):
        if name not in variant.name:
            continue
        made += 1
        started = time.perf_counter()
        try:
            run = variant.make()
        except RunFailed as failure:
            run = {"failed": str(failure)}
        before = found["runs"].get(variant.name)
        if before is not None:
            run = results.pooled(before, run)
        order = orders[variant.name] if name and variant.name in orders else len(found["runs"])
        found["runs"][variant.name] = {"part": part, "order": order, **run}
        if not name:
            found["sittings"][part]["seconds"] = time.perf_counter() - began
        results.save(found, file)
        print(
            f"{part}: {variant.name}: {report.brief(run)}  ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    return made


def main() -> None:
    given = parser().parse_args()
    if not given.report:
        inputs = Inputs(given.peers_python)
        parts = given.only or PARTS
        made = [measure(part, inputs, given.steps, given.results, given.run) for part in parts]
        if not any(made):
            parser().error(f"--run: no run of {', '.join(parts)} has {given.run!r} in its name")
    report.write(results.load(given.results))


if __name__ == "__main__":
    main()
