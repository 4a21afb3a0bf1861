"""Recipe files: finding them, reading them, and following `extends`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli
from attrs import frozen

from lorakit.errors import UserError, did_you_mean, listing, near_path

PACKED_NAME = "recipes.toml"
RUN_RECIPE = "recipe.toml"
"""A run directory's own recipe."""
CHECKPOINTS = "checkpoints"


@frozen
class RecipeFile:
    """A TOML file of recipes, one top-level table each.

    Attributes:
        label: How messages name it.
        text: As written, for `recipes copy`.
        tables: As parsed, `extends` not yet followed.
    """

    label: str
    text: str
    tables: dict[str, Any]

    def names(self) -> list[str]:
        return [name for name, table in self.tables.items() if isinstance(table, dict)]

    def chain(self, name: str) -> list[str]:
        """The recipe and what it extends, the recipe first.

        Raises:
            UserError: There is no such recipe, or the chain is broken or a circle.
        """
        chain: list[str] = []
        wanted: Any = name
        while wanted is not None:
            if not isinstance(wanted, str):
                raise UserError(f"{self.label}:{chain[-1]}: extends: expected a recipe's name")
            if wanted in chain:
                circle = " -> ".join([*chain, wanted])
                raise UserError(f"{self.label}: extends goes in a circle: {circle}")
            if wanted not in self.names():
                hint = did_you_mean(wanted, self.names())
                known = "" if hint else f" (there is: {listing(self.names())})"
                by = f"{chain[-1]}.extends: " if chain else ""
                raise UserError(f"{self.label}: {by}no recipe {wanted!r}{hint}{known}")
            chain.append(wanted)
            wanted = self.tables[wanted].get("extends")
        return chain

    def merged(self, name: str) -> dict[str, Any]:
        """The recipe's table with its parents merged under it."""
        table: dict[str, Any] = {}
        for parent in reversed(self.chain(name)):
            table = deep_merge(table, self.tables[parent])
        table.pop("extends", None)
        return table

    def source(self, name: str) -> str:
        """The recipe's own lines, with the comments above its header."""
        lines = self.text.splitlines()
        header = re.compile(rf'^\s*\[{{1,2}}"?{re.escape(name)}"?[\].]')
        taken: list[str] = []
        inside = False
        for number, line in enumerate(lines):
            if header.match(line):
                if not inside:
                    taken += _comments_above(lines, number)
                inside = True
            elif re.match(r"^\s*\[", line) and inside:
                inside = False
                while taken and (not taken[-1].strip() or taken[-1].startswith("#")):
                    taken.pop()
            if inside:
                taken.append(line)
        return "\n".join(taken).rstrip() + "\n"


def _comments_above(lines: list[str], number: int) -> list[str]:
    start = number
    while start > 0 and lines[start - 1].startswith("#"):
        start -= 1
    return lines[start:number]


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: tables merge key by key, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = deep_merge(old, value)
        else:
            merged[key] = value
    return merged


def packed_file() -> RecipeFile:
    """The recipes that ship with lorakit."""
    packed = files("lorakit") / PACKED_NAME
    if not packed.is_file():
        # An editable install has no copy in the package: recipes.toml lies at the project's root.
        packed = Path(__file__).resolve().parents[2] / PACKED_NAME
    return parse_recipes(PACKED_NAME, packed.read_text(encoding="utf-8"))


def read_recipes(path: str | Path) -> RecipeFile:
    """Reads a file of recipes; `recipes.toml` falls back to the packed one.

    Raises:
        UserError: The file does not exist, or is not TOML.
    """
    path = Path(path)
    if str(path) == PACKED_NAME and not path.exists():
        return packed_file()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.toml")])
        raise UserError(
            f"no recipe file {path}{near}",
            "A recipe is FILE.toml:NAME, or the NAME of one that ships with lorakit "
            "(`lorakit recipes list`).",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return parse_recipes(str(path), text)


def parse_recipes(label: str, text: str) -> RecipeFile:
    """Parses TOML text.

    Raises:
        UserError: It is not TOML; the message has line and column.
    """
    try:
        tables = tomli.loads(text)
    # tomli lets a number of thousands of digits through as a plain ValueError.
    except ValueError as error:
        raise UserError(f"{label}: not valid TOML: {error}") from None
    for key, value in tables.items():
        if not isinstance(value, dict):
            raise UserError(
                f"{label}: {key!r} stands outside of any recipe",
                "Each recipe is a table of its own: put [name] above its keys.",
            )
    return RecipeFile(label, text, tables)


def run_of(file: RecipeFile, name: str) -> Path | None:
    """The run directory whose own recipe this is: where it lies now, wherever it was made."""
    path = Path(file.label)
    made_in = file.tables[name].get("output") if name in file.tables else None
    if path.name != RUN_RECIPE or not (path.parent / CHECKPOINTS).is_dir():
        return None
    # A run's recipe has absolute paths, as a user's beside some checkpoints would not.
    return path.parent if isinstance(made_in, str) and Path(made_in).is_absolute() else None


def find_recipe(reference: str) -> tuple[RecipeFile, str]:
    """`FILE.toml:NAME`, `NAME` of a packed recipe, `FILE.toml` with a single recipe in it, or a run
    directory."""
    run = Path(reference)
    if run.is_dir() and (run / RUN_RECIPE).is_file():
        reference = str(run / RUN_RECIPE)
    # A Windows drive ("C:\x.toml") has a colon too: only what follows ".toml:" is a name.
    match = re.fullmatch(r"(.+\.toml):([^:]*)", reference)
    if match and match[2]:
        return read_recipes(match[1]), match[2]
    path = match[1] if match else reference
    if path.endswith(".toml"):
        file = read_recipes(path)
        if len(file.names()) == 1:
            return file, file.names()[0]
        raise UserError(
            f"{path} holds {len(file.names())} recipes: {listing(file.names())}",
            f"Say which: {path}:NAME",
        )
    file = packed_file()
    if reference in file.names():
        return file, reference
    if os.path.isfile(f"{reference}.toml"):
        names = read_recipes(f"{reference}.toml").names()
        raise UserError(
            f"no recipe {reference!r} ships with lorakit, but here is a file {reference}.toml "
            f"(it holds {listing(names, 'no recipe')})",
            f"Say which of it: {reference}.toml:{names[0] if len(names) == 1 else 'NAME'}",
        )
    if os.path.exists(reference):
        raise UserError(
            f"{reference} is a path, not a recipe", "A recipe is FILE.toml:NAME, or a NAME."
        )
    if run.parent != Path():
        raise UserError(
            f"no run directory {reference}{near_path(run)}",
            "A recipe is FILE.toml:NAME, a NAME, or the directory of a run.",
        )
    return file, reference
