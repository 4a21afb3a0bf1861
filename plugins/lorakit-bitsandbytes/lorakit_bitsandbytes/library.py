"""bitsandbytes itself, imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorakit.errors import UserError

NAME = "bitsandbytes"
FIX = "Install it: pip install --upgrade bitsandbytes"


def load() -> Any:
    """The bitsandbytes module.

    Raises:
        UserError: It is not installed, or fails to import.
    """
    if NAME in sys.modules:
        return importlib.import_module(NAME)
    with _no_hub_kernels():
        try:
            return importlib.import_module(NAME)
        except ImportError as error:
            raise UserError(f"bitsandbytes cannot be imported: {error}", FIX) from None
        # Its import looks for libraries and devices, and fails in ways of its own.
        except Exception as error:
            raise UserError(f"bitsandbytes cannot be imported: {error!r}", FIX) from None


def problems() -> list[str]:
    """Why bitsandbytes cannot be there at all, found without importing it (or torch)."""
    if importlib.util.find_spec(NAME) is not None:
        return []
    return [f"bitsandbytes is not installed. {FIX}"]


@contextmanager
def _no_hub_kernels() -> Iterator[None]:
    """On some CPUs bitsandbytes' import downloads code from a model hub, if the package
    `kernels` is there, and complains if not.  It is for a product that is not used here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, there = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        if there is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = there
