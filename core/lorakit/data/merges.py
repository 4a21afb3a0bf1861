"""Byte-pair merges out of a vocabulary that has ranks but no list of merges.

SentencePiece and tiktoken both join, over and over, the two neighbours whose joint piece ranks
best.  That is BPE with one merge for every way to put a piece together from two others, ordered
by the rank of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping

Merge = tuple[str, str]


def merges_by_rank(ranks: Mapping[str, float], ids: Mapping[str, int]) -> list[Merge]:
    """Every pair of pieces that makes a piece, the best first; of equals, the lower ids first:
    of the whole, then of its parts.  (Runs of spaces often share one rank.)

    Args:
        ranks: The pieces that take part in merges, the smallest number the best.
        ids: The id of each.
    """
    found = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ids[piece], ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
