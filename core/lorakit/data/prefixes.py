"""Documents that begin alike, arranged so that what they share is there once.

Chats often begin with the same system prompt, and often with the same first turns.  A token's
hidden state depends on the tokens before it and on nothing else, so those of a common beginning
are the same in all its documents, and need to be computed once in a micro-batch.

The idea is prefix sharing, as in arXiv 2410.20305, which shares a prompt between two answers to it.
Here any documents may share, to any depth: beginnings form a tree.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

from lorakit.modules.layout import Segments, apart

SHORTEST, SMALLEST_SHARE = 16, 1 / 16
"""Tokens in common, and their share of the document, from which on it is worth it: without kernels
the document has its queries, keys and values copied together in each layer."""


def arranged(documents: Sequence[array[int]]) -> tuple[list[int], list[Segments]]:
    """The documents' order, and for each, in that order, where its tokens lie.

    Args:
        documents: Their token ids.

    Returns:
        The order is the given one where nothing is shared.  Else documents are sorted, which puts
        beside each other those that have most in common.
    """
    order = sorted(range(len(documents)), key=lambda i: documents[i].tobytes())
    found: list[Segments] = []
    stop = 0
    for place, index in enumerate(order):
        document = documents[index]
        common = common_prefix(documents[order[place - 1]], document) if place else 0
        if common < max(SHORTEST, SMALLEST_SHARE * len(document)):
            common = 0
        start, stop = stop, stop + len(document) - common
        shared = _beginning(found[-1], common) if common else ()
        found.append((*shared, slice(start, stop)))
    if all(len(segments) == 1 for segments in found):
        return list(range(len(documents))), list(apart([len(d) for d in documents]))
    return order, found


def common_prefix(one: array[int], other: array[int]) -> int:
    """How many tokens two documents begin with in common."""
    most = min(len(one), len(other))
    # What differs up to some length differs up to every greater one; slices are compared at once.
    return bisect_left(range(1, most + 1), True, key=lambda n: one[:n] != other[:n])


def _beginning(segments: Segments, length: int) -> Segments:
    """The part of a document that its first tokens take."""
    found = []
    for segment in segments:
        taken = min(length, segment.stop - segment.start)
        if taken:
            found.append(slice(segment.start, segment.start + taken))
        length -= taken
    return tuple(found)
