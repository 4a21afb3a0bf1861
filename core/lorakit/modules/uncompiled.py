"""What torch.compile leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_marked: list[list[Callable[..., Any]]] = []


def uncompiled(function: F) -> F:
    """Marks a function that depends on the lengths of a micro-batch's documents: compiled, it
    would be so anew for each micro-batch.  Costs nothing where nothing is compiled, and does not
    import the compiler."""
    called: list[Callable[..., Any]] = [function]
    _marked.append(called)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return called[0](*args, **kwargs)

    return call  # type: ignore[return-value]


def leave_uncompiled() -> None:
    """Keeps the compiler out of all marked functions, from here on."""
    while _marked:
        called = _marked.pop()
        called[0] = torch.compiler.disable(called[0])
