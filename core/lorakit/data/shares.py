"""Documents shared out evenly, to be computed at the same time."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.modules.layout import Segments

COUNTS = (4, 2)
"""How many shares there may be: each has all weights pass through the processor's caches once."""
SMALLEST = 384
"""Tokens of a share from which on it is worth it: below, products of half as many rows cost more
than waiting does (on two cores of an Intel Xeon, shares of 250 tokens were 5% slower than none, of
500 as fast, and of 1,000 up to a tenth faster)."""
LEAST_EVEN = 15 / 16
"""How much of the time threads must be busy until the last is done: what torch makes of its own,
waiting after each operation, comes to as much on a quiet machine, and to less on others."""
MOST_TRIED = 16
"""Documents of which every division in two is tried; of more, the simple one is good."""


def shared_out(documents: Sequence[Segments], threads: int) -> list[list[int]]:
    """The documents of each share, by their places.

    Args:
        documents: Where the tokens of each lie: what they begin with in common is there once, and
            once in every share.
        threads: How many the shares use together.

    Returns:
        As many shares as keep the threads busy; one only, of all documents, where none do.
    """
    everything = list(range(len(documents)))
    lengths = [parts[-1].stop - parts[-1].start for parts in documents]
    for count in COUNTS:
        each = threads // count
        if not each or len(lengths) < count:
            continue
        shares = [everything]
        while len(shares) < count:
            shares = [half for share in shares for half in halved(share, lengths)]
        sizes = [_tokens(documents, share) for share in shares]
        busy = _tokens(documents, everything) * each / (max(sizes) * threads)
        if min(sizes) >= SMALLEST and busy >= LEAST_EVEN:
            return shares
    return [everything]


def most_shares(tokens: int, threads: int) -> int:
    """How many shares there are at the most of a micro-batch of so many tokens."""
    possible = [n for n in COUNTS if threads // n and tokens // n >= SMALLEST]
    return max(possible, default=1)


def _tokens(documents: Sequence[Segments], share: Sequence[int]) -> int:
    """What there is to compute of some documents."""
    found = bytearray(max(parts[-1].stop for parts in documents))
    for place in share:
        for part in documents[place]:
            found[part] = b"\1" * (part.stop - part.start)
    return sum(found)


def halved(places: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two shares of as much as can be; both in the order given."""
    some = _best_half(places, lengths) if len(places) <= MOST_TRIED else _half(places, lengths)
    return [p for p in places if p in some], [p for p in places if p not in some]


def _best_half(places: Sequence[int], lengths: Sequence[int]) -> set[int]:
    """Of all sums of documents up to a half, those of the largest."""
    most = sum(lengths[place] for place in places) // 2
    reached: dict[int, tuple[int, ...]] = {0: ()}
    for place in places:
        for size, some in list(reached.items()):
            if size + lengths[place] <= most:
                reached.setdefault(size + lengths[place], (*some, place))
    return set(reached[max(reached)])


def _half(places: Sequence[int], lengths: Sequence[int]) -> set[int]:
    """The longest first, each to where there is less so far (Graham 1969)."""
    some: set[int] = set()
    ahead = 0
    for place in sorted(places, key=lambda p: -lengths[p]):
        if ahead <= 0:
            some.add(place)
        ahead += lengths[place] if place in some else -lengths[place]
    return some
