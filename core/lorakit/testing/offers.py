"""What holds for records of every kind, and for the modules they come from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import attrs

from lorakit.records import Offer
from lorakit.structuring import structure, unstructure
from lorakit.testing.failure import ensure

LONGEST_SUMMARY = 100
_TORCH_FREE = """
import importlib, sys
before = "torch" in sys.modules
module = importlib.import_module(sys.argv[1])
for name, hook in sorted(vars(module).items()):
    if name.startswith("lorakit_") and name != "lorakit_recipe_problems" and callable(hook):
        list(hook())
sys.exit(3 if "torch" in sys.modules and not before else 0)
"""


def check_offer(record: Offer) -> None:
    """Checks name, summary and options.

    Raises:
        ConformanceError: Something does not hold.
    """
    ensure(
        re.fullmatch(r"[a-z0-9]+([_-][a-z0-9]+)*", record.name),
        f"name: {record.name!r} is not lower-case words joined by _ or -",
    )
    summary = record.summary
    ensure(summary and summary == summary.strip(), f"summary: {summary!r} is empty or padded")
    ensure("\n" not in summary, "summary: more than one line")
    ensure(len(summary) <= LONGEST_SUMMARY, f"summary: longer than {LONGEST_SUMMARY} characters")
    options: Any = record.options
    ensure(isinstance(options, type) and attrs.has(options), "options: not an attrs class")
    documented = "\n".join(c.__doc__ or "" for c in options.__mro__ if c is not object)
    for field in attrs.fields(options):
        ensure(
            re.search(rf"^\s*{field.name}:", documented, re.MULTILINE),
            f"options: {options.__name__}'s docstring does not say what {field.name} is",
        )


def make_options(record: Offer, given: Mapping[str, Any] | None = None, **needed: Any) -> Any:
    """The record's options, structured as a recipe's section is, and back.

    Args:
        record: Whose.
        given: The section's keys; the rest is at its default.
        needed: Keys that every section of the kind has (`path`), unless given.

    Raises:
        ConformanceError: They are refused, or are not the same after a round through TOML.
    """
    table = {**needed, **(given or {})}
    options, problems = structure(record.options, table, record.name)
    ensure(options is not None, f"options: {table} is refused: {'; '.join(problems)}")
    again, problems = structure(record.options, unstructure(options), record.name)
    ensure(again == options, f"options: written to recipe.toml, they come back as {again}")
    return options


def check_torch_free(module: str) -> None:
    """Imports an entry-point module and calls its hooks in a process of their own.

    Raises:
        ConformanceError: That loaded torch, or failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _TORCH_FREE, module],
        # The module may be importable here by what a test has put on the path.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    ensure(done.returncode != 3, f"{module}: imports torch; import it inside the verbs")
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    ensure(done.returncode == 0, f"{module}: {said[-1]}")
