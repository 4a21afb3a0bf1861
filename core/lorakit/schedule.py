"""The learning rate's factor as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from lorakit.options import ScheduleOptions

_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_factor(step: int, total_steps: int, options: ScheduleOptions) -> float:
    """What the peak learning rate is multiplied by.

    Args:
        step: Optimizer steps done before this one, from 0.
        total_steps: Of the whole run.
        options: The schedule.

    Returns:
        (step + 1)/warm-up in the warm-up, so that no step is wasted at 0; from then on the
        decay, which would reach 0 at total_steps, one step after the last.
    """
    warmup = options.warmup(total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return _DECAYS[options.name](progress)
