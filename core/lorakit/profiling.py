"""A profile of a few steps: what they spend their time on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic import write_file
from lorakit.logs import LoggerGroup

WARM_UP_STEPS = 2
RECORDED_STEPS = 2
SHOWN = 10


@contextmanager
def profiled(
    optimizer: torch.optim.Optimizer, steps: int, directory: Path, log: LoggerGroup
) -> Iterator[None]:
    """Within it, two optimizer steps are recorded once two have gone before; a run of fewer
    records what there is.

    Writes `trace.json` (Chrome's trace format, for Perfetto or chrome://tracing) and
    `operations.txt`, the ten costliest operations.

    Args:
        optimizer: Its steps are counted.
        steps: How many it will do.
        directory: Where the files go.
        log: Is told the table.
    """
    profiler = torch.profiler.profile(record_shapes=True)
    first = max(0, min(WARM_UP_STEPS, steps - 1))
    last = min(first + RECORDED_STEPS, steps)
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == first:
            profiler.start()
        if done == last:
            _write(profiler, last - first, directory, log)

    if first == 0 and steps > 0:
        profiler.start()
    hook = optimizer.register_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()
        # A run that was stopped while it was recorded.
        if first <= done < last:
            _write(profiler, max(1, done - first), directory, log)


def _write(profiler: Any, steps: int, directory: Path, log: LoggerGroup) -> None:
    profiler.stop()
    directory.mkdir(parents=True, exist_ok=True)
    trace = directory / "trace.json"
    profiler.export_chrome_trace(str(trace))
    table = costliest(profiler.key_averages(group_by_input_shape=True), steps)
    write_file(directory / "operations.txt", f"{table}\n".encode())
    log.notice(f"profile of {steps} steps: {trace}\n{table}")


def costliest(operations: Any, steps: int) -> str:
    """The ten operations that take the most time by themselves, a line each.

    Args:
        operations: From torch's profiler, grouped by shapes.
        steps: How many were recorded.
    """
    on_device = any(o.self_device_time_total for o in operations)
    seconds = {
        id(o): (o.self_device_time_total if on_device else o.self_cpu_time_total) / 1e6 / steps
        for o in operations
    }
    total = sum(seconds.values()) or 1.0
    most = sorted(operations, key=lambda o: seconds[id(o)], reverse=True)[:SHOWN]
    lines = ["  ms/step  share  calls/step  operation"]
    for o in most:
        spent = seconds[id(o)]
        shapes = " x ".join("x".join(map(str, s)) for s in o.input_shapes if s)
        lines.append(
            f"{spent * 1e3:9.1f}  {spent / total:5.1%}  {o.count / steps:10.4g}  {o.key}  {shapes}"
        )
    return "\n".join(lines)
