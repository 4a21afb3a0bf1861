"""How lorakit says that something is wrong: where, what, and the nearest fix."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


class LorakitError(Exception):
    """Base of all errors lorakit raises on purpose; shown without a traceback."""

    exit_status = 1


class UserError(LorakitError):
    """The user's input is wrong: a recipe, a flag, a file.

    Args:
        message: Where and what: `data.path: no file runs/x.jsonl`.
        fix: The nearest fix, a sentence of its own; empty if there is none to offer.
    """

    exit_status = 2

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  {self.fix}" if self.fix else self.message


class RecipeError(UserError):
    """Everything that is wrong with one recipe, at once.

    Args:
        where: The recipe: `recipes.toml:mistral_7b_qlora`.
        problems: One line each, starting with the full key.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{where}: {count}", *(f"  {p}" for p in self.problems)]))


class RunError(LorakitError):
    """The run failed though its input was right."""


class Interrupted(LorakitError):
    """A signal stopped the run; the message says what of it is saved, and how to go on.

    Args:
        message: Shown as it is.
        number: The signal's; a shell and a scheduler expect 128 more as the exit status.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


def did_you_mean(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean 'rank'?)` if one of `choices` is near to `word`, else an empty string."""
    near = get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def near_path(path: Path) -> str:
    """` (did you mean 'one.toml'?)` if the first part of `path` that does not exist is like
    something that lies there, else an empty string."""
    try:
        missing, parent = path, path.parent
        while not parent.is_dir():
            missing, parent = parent, parent.parent
        near = get_close_matches(missing.name, [p.name for p in parent.iterdir()], n=1)
    except OSError:
        return ""
    if not near:
        return ""
    return f" (did you mean {near[0] if missing is path else str(parent / near[0])!r}?)"


def looks_local(path: Path) -> bool:
    """Whether a path that does not exist was likely meant for one of this machine: it would lie
    in a directory that is here, or is like something that is."""
    try:
        beside = path.parent != Path() and path.parent.is_dir()
    except OSError:
        return False
    return beside or near_path(path) != ""


def disk_size(size: int) -> str:
    """Bytes as disks are sold: `3.9 GB`, `12.0 kB`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} bytes"


def listing(names: Iterable[str], none: str = "none") -> str:
    """`a, b and c`, for use in a sentence."""
    names = list(names)
    if len(names) < 2:
        return names[0] if names else none
    return f"{', '.join(names[:-1])} and {names[-1]}"
