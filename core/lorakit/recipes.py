"""From a recipe's text to a resolved recipe: every default filled in, every name looked up."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli
from attrs import define, evolve, field, frozen
from attrs.validators import ge, le

from lorakit.catalog import KINDS, Catalog, load_catalog
from lorakit.errors import RecipeError, UserError, did_you_mean, listing, near_path
from lorakit.foreign_names import ours
from lorakit.options import (
    AUTO,
    TORCH,
    EvaluationOptions,
    SampleOptions,
    ScheduleOptions,
    TrainingOptions,
    check_device,
    not_empty,
)
from lorakit.recipe_files import RecipeFile, deep_merge, find_recipe, run_of
from lorakit.records import Offer
from lorakit.structuring import describe_value, structure, unstructure


@frozen(kw_only=True)
class RunOptions:
    """A recipe's top-level keys that are not sections.

    Attributes:
        summary: One line for `lorakit recipes list`.
        output: The run directory.
        seed: Of the data's order, of the adapter's initial values and of dropout.
        device: `auto`, `cuda`, `cuda:N`, `mps` or `cpu`.
    """

    summary: str = ""
    output: str = field(validator=not_empty)
    # Multiplied to tell epochs apart, it still fits into the 64 bits of a generator's.
    seed: int = field(default=0, validator=[ge(0), le(2**32 - 1)])
    device: str = field(default="auto", validator=check_device)


@frozen
class Section:
    """A plugin's record and the options the recipe gives it."""

    record: Any
    options: Any

    @property
    def name(self) -> str:
        return str(self.record.name)


@frozen(kw_only=True)
class Recipe:
    """A resolved recipe.  Sections that name a plugin hold its record."""

    name: str
    run: RunOptions
    model: Section
    quantization: Section | None
    adapter: Section
    optimizer: Section
    schedule: ScheduleOptions
    precision: Section
    data: Section
    training: TrainingOptions
    checkpointer: Section
    loggers: tuple[Section, ...]
    samples: SampleOptions
    evaluation: EvaluationOptions | None = None
    catalog: Catalog = field(repr=False, eq=False)

    @property
    def output(self) -> Path:
        return Path(self.run.output)

    def with_output(self, output: str | Path) -> Recipe:
        return evolve(self, run=evolve(self.run, output=str(output)))

    def table(self) -> dict[str, Any]:
        """The recipe as a TOML table with every default spelled out."""
        table = {k: v for k, v in unstructure(self.run).items() if v != ""}
        for key in _PLUGIN_SECTIONS:
            section = getattr(self, key)
            if section is not None:
                table[key] = section_table(section)
        for key in _OWN_SECTIONS:
            section = getattr(self, key)
            if section is not None:
                table[key] = unstructure(section)
        table["loggers"] = [section_table(s) for s in self.loggers]
        return table

    def text(self) -> str:
        """The recipe as a TOML file."""
        import tomli_w

        return tomli_w.dumps({self.name: self.table()})


_PLUGIN_SECTIONS = (
    "model",
    "quantization",
    "adapter",
    "optimizer",
    "precision",
    "data",
    "checkpointer",
)
_OWN_SECTIONS = {
    "schedule": ScheduleOptions,
    "training": TrainingOptions,
    "samples": SampleOptions,
    "evaluation": EvaluationOptions,
}
_RUN_KEYS = ("summary", "output", "seed", "device")
_REQUIRED = ("model", "data")
_OPTIONAL = ("quantization", "evaluation")
"""Sections that are nothing where a recipe leaves them out."""


def section_table(section: Section) -> dict[str, Any]:
    """The section as a recipe writes it, every default spelled out."""
    return {"name": section.name, **unstructure(section.options)}


def read_section(kind: str, table: Mapping[str, Any], catalog: Catalog, where: str) -> Section:
    """What `section_table` wrote.

    Args:
        kind: What the section names: `quantization`.
        table: The section.
        catalog: What is installed.
        where: The file it was written to, for messages.

    Raises:
        UserError: Nobody offers what it names, or its other keys are wrong.
    """
    record = catalog.get(kind, str(table.get("name")))
    others = {key: value for key, value in table.items() if key != "name"}
    options, problems = structure(record.options, others, kind)
    if options is None:
        raise RecipeError(where, problems)
    return Section(record, options)


def resolve_recipe(
    reference: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    catalog: Catalog | None = None,
) -> Recipe:
    """Finds, merges, overrides and structures a recipe.

    Raises:
        RecipeError: With everything that is wrong with it.
        UserError: The file or the recipe does not exist.
    """
    file, name = find_recipe(reference)
    table = file.merged(name)
    run = run_of(file, name)
    if run is not None:
        table["output"] = os.fspath(run)
    for key, value in (overrides or {}).items():
        table = deep_merge(table, _nested(key, value))
    if output is not None:
        table["output"] = os.fspath(output)
    return _Resolver(file, name, catalog or load_catalog()).resolve(table)


def resolve_table(name: str, table: Mapping[str, Any], catalog: Catalog | None = None) -> Recipe:
    """Structures a recipe that is a table already."""
    file = RecipeFile(name, "", {})
    return _Resolver(file, name, catalog or load_catalog()).resolve(dict(table))


def parse_override(text: str) -> tuple[str, Any]:
    """`a.b=VALUE` -> the key and the value: TOML if it is, else the bare word.

    Raises:
        UserError: There is no `=`, or the key is not dotted words.
    """
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"--set {text}: expected KEY=VALUE, such as --set training.epochs=2")
    try:
        return key, tomli.loads(f"value = {raw}")["value"]
    except ValueError:
        return key, raw


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


@define
class _Resolver:
    """Collects problems while it goes through the sections."""

    file: RecipeFile
    name: str
    catalog: Catalog
    problems: list[str] = field(factory=list)

    def resolve(self, table: dict[str, Any]) -> Recipe:
        run_keys = [key for key in _RUN_KEYS if key in table]
        sections = {*_PLUGIN_SECTIONS, *_OWN_SECTIONS, "loggers"}
        known = [*sorted(sections), *_RUN_KEYS, "extends"]
        for key, value in table.items():
            if key not in sections and key not in run_keys:
                word = "section" if isinstance(value, dict) else "key"
                hint = ours(key, "", known) or did_you_mean(key, known)
                hint = hint or f" (known: {listing(known)})"
                self.problems.append(f"{key}: unknown {word}{hint}")

        values: dict[str, Any] = {"run": self._own(RunOptions, {k: table[k] for k in run_keys}, "")}
        for key in _PLUGIN_SECTIONS:
            values[key] = self._plugin(key, table.get(key))
        for key, options in _OWN_SECTIONS.items():
            if key in table or key not in _OPTIONAL:
                values[key] = self._own(options, table.get(key, {}), key)
        values["loggers"] = self._loggers(table.get("loggers"))
        if values["training"] is not None:
            self._check_kernels(values["training"].kernels)
        self._check_paths(table)
        if self.problems:
            raise self._error()
        recipe = Recipe(name=self.name, catalog=self.catalog, **values)
        for rule, plugin in self.catalog.rules:
            try:
                self.problems += rule(recipe=recipe)
            except Exception as error:
                self.problems.append(f"{plugin.label}: its recipe rule failed: {error!r}")
        if self.problems:
            raise self._error()
        return recipe

    def _error(self) -> RecipeError:
        label = self.file.label
        return RecipeError(f"{label}:{self.name}" if label != self.name else label, self.problems)

    def _own(self, options: type[Any], table: Any, key: str) -> Any:
        if not isinstance(table, Mapping):
            self.problems.append(f"{key}: expected a table, got {describe_value(table)}")
            return None
        instance, problems = structure(options, table, key)
        self.problems += problems
        return instance

    def _plugin(self, key: str, table: Any) -> Section | None:
        """One section that names a plugin, or the kind's default if it or its name is left out."""
        kind = next(k.word for k in KINDS.values() if k.section == key)
        if table is None and key in _OPTIONAL:
            return None
        if table is None or (isinstance(table, Mapping) and "name" not in table):
            fixed = key in _REQUIRED or key in _OPTIONAL
            defaults = [] if fixed else self.catalog.defaults(kind)
            if len(defaults) == 1:
                return self._structured(defaults[0], table or {}, key)
        if table is None:
            self.problems.append(f'{key}: missing, expected {key} = {{name = "..."}}')
            return None
        return self._named(kind, table, key)

    def _named(self, kind: str, table: Any, key: str) -> Section | None:
        if not isinstance(table, Mapping):
            self.problems.append(
                f'{key}: expected a table, {{name = "..."}}, got {describe_value(table)}'
            )
            return None
        name = table.get("name")
        if not isinstance(name, str):
            names = listing(self.catalog.names(kind))
            found = "missing" if name is None else f"expected a string, got {describe_value(name)}"
            self.problems.append(f"{key}.name: {found} (there is: {names})")
            return None
        try:
            record = self.catalog.get(kind, name)
        except UserError as error:
            self.problems.append(f"{key}.name: {error.message}")
            if error.fix:
                self.problems[-1] += f". {error.fix}"
            return None
        return self._structured(record, {k: v for k, v in table.items() if k != "name"}, key)

    def _structured(self, record: Offer, table: Mapping[str, Any], key: str) -> Section | None:
        options, problems = structure(record.options, table, key)
        self.problems += problems
        return None if options is None else Section(record, options)

    def _check_kernels(self, name: str) -> None:
        if name in (AUTO, TORCH):
            return
        try:
            self.catalog.get("kernels", name)
        except UserError as error:
            fix = f"{error.fix}. " if error.fix else ""
            self.problems.append(
                f'training.kernels: {error.message}. {fix}"{AUTO}" and "{TORCH}" are always there'
            )

    def _loggers(self, tables: Any) -> tuple[Section, ...]:
        if tables is None:
            found = [self._structured(r, {}, "loggers") for r in self.catalog.defaults("logger")]
        elif not isinstance(tables, list):
            got = describe_value(tables)
            self.problems.append(f'loggers: expected a list, [{{name = "..."}}], got {got}')
            return ()
        else:
            found = [
                self._named("logger", table, f"loggers[{index}]")
                for index, table in enumerate(tables)
            ]
        return tuple(s for s in found if s is not None)

    def _check_paths(self, table: Mapping[str, Any]) -> None:
        """What can be known about paths without opening anything, whatever else is wrong with
        their sections."""
        model, data = _string_of(table.get("model")), _string_of(table.get("data"))
        if model:
            sources = self.catalog.all("model source")
            if not any(source.claims(model) for source in sources):
                examples = listing([e for source in sources for e in source.examples])
                self.problems.append(
                    f"model.path: {describe_value(model)} is no directory or file here"
                    f"{near_path(Path(model))}, and of no other model source (such paths look "
                    f"like: {examples})"
                )
        if data:
            pattern, split = (_string_of(table["data"], key) for key in ("files", "split"))
            self.problems += data_path_problems(data, pattern, split)
        pattern, split = (_string_of(table.get("evaluation"), k) for k in ("files", "split"))
        path = _string_of(table.get("evaluation"))
        if not path and (pattern or split) and "fraction" not in table["evaluation"]:
            path = data
        if path:
            self.problems += data_path_problems(path, pattern, split, section="evaluation")


def _string_of(section: Any, key: str = "path") -> str:
    """A section's string; empty if it has none there, which structuring reports."""
    value = section.get(key) if isinstance(section, Mapping) else None
    return value if isinstance(value, str) else ""


def data_path_problems(path: str, pattern: str, split: str, *, section: str = "data") -> list[str]:
    """What is wrong with a `data.path`, or another section's, judged by names alone; an empty
    `split` is none given."""
    from lorakit.data.files import TRAIN, check_data_path, of_section

    try:
        check_data_path(path, pattern, split or TRAIN)
    except UserError as found:
        error = of_section(found, section)
        key = "" if error.message.startswith(f"{section}.") else f"{section}.path: "
        return [key + error.message + (f". {error.fix}" if error.fix else "")]
    return []
