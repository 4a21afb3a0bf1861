"""A run directory: which one a run gets, and whether it can be resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli
from filelock import FileLock, Timeout

from lorakit.atomic import why_not_writable, write_file
from lorakit.errors import RecipeError, UserError, listing
from lorakit.local_paths import with_absolute_paths
from lorakit.protocols import SnapshotStore
from lorakit.recipe_files import CHECKPOINTS, RUN_RECIPE
from lorakit.recipes import Recipe

RECIPE = RUN_RECIPE
LOCK = ".lock"
ADAPTER = "adapter"
MERGED = "merged"
PROFILE = "profile"

FIXED = (
    "seed",
    "model",
    "quantization",
    "adapter",
    "optimizer",
    "schedule",
    "precision",
    "data",
    "evaluation.fraction",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.max_grad_norm",
)
"""What a resumed run must have as it was started; the rest may change."""
MOVABLE = ("data.path",)
"""But for these: of the data, each token is compared, and the file may lie elsewhere by now."""


def free_output(output: Path, fixed: bool) -> Path:
    """The directory a new run writes to.

    Args:
        output: As the recipe or the user has it.
        fixed: It must be this one.

    Raises:
        UserError: It is fixed and holds a run already, or it cannot be a directory to write to.
    """
    # Not pathlib's, which raises where a name is too long.
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"output: {output} is a file", "Name a directory with --output.")
    why = why_not_writable(output)
    if why:
        raise UserError(f"output: {output} cannot be made: {why}", "Name another --output.")
    if not holds_run(output):
        _refuse_foreign(output)
        return output
    if fixed:
        if _in_use(output):
            raise _in_use_by_another(output)
        raise UserError(
            f"output: {output} holds a run already",
            "Continue it with --resume, or name another --output.",
        )
    number = 2
    while holds_run(output.with_name(f"{output.name}-{number}")):
        number += 1
    return output.with_name(f"{output.name}-{number}")


def _refuse_foreign(output: Path) -> None:
    """What lies there and is of no run would be mixed with this one's files."""
    if (output / RECIPE).exists() or not output.exists():
        return
    found = sorted(p.name for p in output.iterdir() if not p.name.startswith("."))
    if found:
        raise UserError(
            f"output: {output} is not empty and holds no run: there is {listing(found)}",
            "Name another --output.",
        )


@contextmanager
def occupied(output: Path) -> Iterator[None]:
    """Keeps other processes from training in a directory while this one does.

    The operating system lets go of the lock when the process ends, however it ends.

    Raises:
        UserError: Another one does.
    """
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: {output} cannot be written to: {error}", "Name another --output."
        ) from None
    lock = FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _in_use_by_another(output) from None
    except (OSError, NotImplementedError):
        # Some network file systems have no locks, and a run may go on without.
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            # While it is held: another process might have it by the time it is released.
            with suppress(OSError):
                (output / LOCK).unlink(missing_ok=True)
            lock.release()
        if made:
            # Refused where there is something in it.
            with suppress(OSError):
                output.rmdir()


def _in_use(output: Path) -> bool:
    if not (output / LOCK).exists():
        return False
    lock = FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
    lock.release()
    return False


def _in_use_by_another(output: Path) -> UserError:
    return UserError(
        f"output: {output} is in use by another lorakit process",
        "Wait for it to end, or name another --output.",
    )


def write_recipe(recipe: Recipe) -> None:
    """Writes recipe.toml, with the paths of this machine absolute: whoever reads it later may be
    in another directory.

    Raises:
        UserError: The file system does not take it.
    """
    try:
        write_file(recipe.output / RECIPE, with_absolute_paths(recipe).text().encode())
    except OSError as error:
        raise UserError(
            f"output: {recipe.output} cannot be written to: {error}", "Name another --output."
        ) from None


def holds_run(output: Path) -> bool:
    """Whether a run left something there that would be a loss, or is under way."""
    left = any((output / part).exists() for part in (CHECKPOINTS, ADAPTER, MERGED))
    return left or _in_use(output)


def check_resumable(recipe: Recipe, store: SnapshotStore) -> None:
    """Refuses to continue a run under a recipe that would not have led there.

    Raises:
        UserError: There is no run, or it has no checkpoint.
        RecipeError: With each key that differs.
    """
    file = recipe.output / RECIPE
    if not os.path.isfile(file):
        raise UserError(
            f"--resume: {recipe.output} holds no run",
            "Leave out --resume to start one, or name the run's directory with --output.",
        )
    if not store.steps():
        if _in_use(recipe.output):
            raise _in_use_by_another(recipe.output)
        raise UserError(
            f"--resume: {recipe.output} has no complete checkpoint",
            "Leave out --resume to start over.",
        )
    (started,) = tomli.loads(file.read_text(encoding="utf-8")).values()
    now = with_absolute_paths(recipe).table()
    problems = [
        f"{key}: the run was started with {_shown(before)}, the recipe now has {_shown(after)}"
        for section in FIXED
        for key, before, after in differences(_at(started, section), _at(now, section), section)
        if key not in MOVABLE
    ]
    if problems:
        raise RecipeError(f"--resume {recipe.output}", problems)


def check_not_over(step: int, total_steps: int) -> None:
    """Refuses to continue a run to an end that it has passed.

    Raises:
        UserError: It has.
    """
    if total_steps < step:
        raise UserError(
            f"--resume: the run has done {step} steps, and the recipe now ends after {total_steps}",
            "Set training.max_steps or training.epochs to at least what is done.",
        )


def differences(before: Any, after: Any, key: str) -> list[tuple[str, Any, Any]]:
    """Dotted keys at which two tables differ, with both values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return [
            found
            for part in sorted({*before, *after})
            for found in differences(before.get(part), after.get(part), f"{key}.{part}")
        ]
    return [] if before == after else [(key, before, after)]


def _at(table: Mapping[str, Any], key: str) -> Any:
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)
