"""The largest micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt

MOST_TRIES = 6
CLOSE_ENOUGH = 0.97
WIDE = 4
LARGEST = 2**17
"""Tokens beyond which nobody looks."""


def most_tokens_that_fit(
    peak: Callable[[int], int], known: Mapping[int, int], room: int, largest: int = LARGEST
) -> int:
    """The largest n with peak(n) <= room, to within 3% or what a few tries find; 0 if none was
    found to.

    Peaks grow nearly linearly, so each try is where a line through two known points meets the
    room.

    Args:
        peak: Bytes for n, growing with n; costly.
        known: Two values of it at least.
        room: Bytes.
        largest: Look no further.
    """
    found = dict(known)
    for _ in range(MOST_TRIES):
        fitting = max((n for n in found if found[n] <= room), default=0)
        bound = min((n for n in found if found[n] > room), default=largest + 1)
        if bound - fitting <= 1 or CLOSE_ENOUGH * bound <= fitting:
            break
        guess = min(max(_guess(found, fitting, bound, room), fitting + 1), bound - 1)
        if guess * CLOSE_ENOUGH <= fitting:
            break
        found[guess] = peak(guess)
    return max((n for n in found if found[n] <= room), default=0)


def _guess(found: Mapping[int, int], fitting: int, bound: int, room: int) -> int:
    if bound not in found:
        low, high = sorted(found)[-2:]
    elif not fitting:
        low, high = sorted(found)[:2]
    elif bound > WIDE * fitting:
        return isqrt(fitting * bound)
    else:
        low, high = fitting, bound
    slope = (found[high] - found[low]) / (high - low)
    if slope <= 0:
        return bound
    # Just below where they meet: a try is worth more if it fits.
    meeting = int(low + 0.99 * (room - found[low]) / slope)
    # The line may end below 1; too low a try says little.
    return meeting if fitting else max(meeting, bound // 8)
