"""What is compared with what, and what is aimed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from tests.bench.results import succeeded, tokens_per_second

CANDIDATE = "lorakit: "
"""What runs of candidate settings begin with."""


@frozen
class Target:
    """lorakit against a peer.

    Attributes:
        peer: The peer's run.
        faster: Its tokens per second, at least so many times.
        smaller: Of its peak memory, at most so much.
        ours: What lorakit's runs that may stand against it begin with.
    """

    peer: str
    faster: float
    smaller: float
    ours: str = CANDIDATE


SHORT = (
    Target("TRL, padded batches of 4", 6, 0.4),
    Target("TRL, padded batches of 4, checkpointing off", 6, 0.4),
    Target("TRL, packed 4 x 512", 4, 0.33),
    Target("TRL, packed 4 x 512, checkpointing off", 4, 0.33),
    Target("HF loop, padded batches of 4", 3, 0.4),
)
QLORA = (Target("TRL nf4, padded batches of 4", 8, 0.5, "lorakit nf4"),)
LONG = {
    length: Target(
        f"TRL, one chat of {length:,} tokens", 3, 0.3, f"lorakit, one chat of {length:,} tokens"
    )
    for length in (4096, 8192)
}
GEMM_FRACTION = 0.7
FLAT_WITHIN = 0.2
DORA_OVERHEAD = 0.1
STARTUP_SECONDS = 6.0


def ratios(results: Mapping[str, Any], target: Target, ours: str) -> tuple[float, float] | None:
    """Tokens per second and peak memory over the peer's; None where a run is missing."""
    if not (succeeded(results, target.peer) and succeeded(results, ours)):
        return None
    mine, peer = results["runs"][ours], results["runs"][target.peer]
    faster = tokens_per_second(mine) / tokens_per_second(peer)
    return faster, mine["peak_bytes"] / peer["peak_bytes"]


def chosen(results: Mapping[str, Any], targets: Sequence[Target] = SHORT) -> str | None:
    """lorakit's run that meets the most of the targets, the fastest of those that meet as many.

    Args:
        results: As in the file.
        targets: One setting is to meet them all.
    """

    def merit(name: str) -> tuple[int, float]:
        met = 0
        for target in targets:
            found = ratios(results, target, name)
            if found:
                met += (found[0] >= target.faster) + (found[1] <= target.smaller)
        return met, tokens_per_second(results["runs"][name])

    candidates = [
        name
        for name in results["runs"]
        if name.startswith(targets[0].ours) and succeeded(results, name)
    ]
    return max(candidates, key=merit, default=None)
