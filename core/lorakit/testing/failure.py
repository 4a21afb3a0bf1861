"""How a conformance check fails."""

from __future__ import annotations


class ConformanceError(AssertionError):
    """A plugin does not keep to its record's contract; the message says which part."""


def ensure(holds: object, message: str) -> None:
    """Raises `ConformanceError` with `message` unless `holds`.

    A function rather than `assert`: pytest rewrites no assert in an installed package, and
    `python -O` leaves them out.
    """
    if not holds:
        raise ConformanceError(message)
