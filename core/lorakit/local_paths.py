"""A recipe's paths, made to mean the same from every directory: for what a run writes down."""

from __future__ import annotations

import os
from collections.abc import Callable
from glob import escape
from typing import Any

from attrs import evolve, fields

from lorakit.data.files import SHIPPED, hub_data
from lorakit.options import LOCAL_PATH
from lorakit.recipes import Recipe, Section


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with all paths absolute that are of this machine: `output`, `model.path`,
    `data.path` and `evaluation.path` where they are, and what plugins have marked with
    `lorakit.options.LOCAL_PATH`."""
    sections = {f.name: getattr(recipe, f.name) for f in fields(Recipe)}
    made: dict[str, Any] = {
        k: _with_marked(s) for k, s in sections.items() if isinstance(s, Section)
    }
    made["model"] = _with_path(made["model"], absolute_where_it_exists)
    made["data"] = _with_path(made["data"], absolute_data_path)
    if recipe.evaluation is not None and recipe.evaluation.path:
        path = absolute_data_path(recipe.evaluation.path)
        made["evaluation"] = evolve(recipe.evaluation, path=path)
    made["loggers"] = tuple(map(_with_marked, recipe.loggers))
    return evolve(recipe.with_output(absolute_path(recipe.output)), **made)


def _with_path(section: Section, absolute: Callable[[str], str]) -> Section:
    path = absolute(section.options.path)
    return evolve(section, options=evolve(section.options, path=path))


def _with_marked(section: Section) -> Section:
    options = section.options
    paths = {
        f.name: absolute_path(getattr(options, f.name))
        for f in fields(type(options))
        if LOCAL_PATH.items() <= f.metadata.items() and getattr(options, f.name)
    }
    return evolve(section, options=evolve(options, **paths))


def absolute_path(path: str | os.PathLike[str]) -> str:
    """The path with the links among its directories followed, so that a place has one spelling.
    What it ends in keeps its name, for a file's says what format it has."""
    folder, name = os.path.split(os.path.expanduser(path))
    return os.path.normpath(os.path.join(os.path.realpath(folder), name))


def absolute_where_it_exists(path: str) -> str:
    """A path that nothing here is called by is of another source, and stays."""
    return absolute_path(path) if os.path.exists(os.path.expanduser(path)) else path


def absolute_data_path(path: str) -> str:
    """A `data.path`: absolute if it is a file, a directory or a glob."""
    if path.startswith(SHIPPED) or hub_data(path) is not None:
        return path
    if os.path.exists(os.path.expanduser(path)):
        return absolute_path(path)
    # The directory is none of the pattern, whatever letters it is called by.
    return os.path.normpath(os.path.join(escape(os.getcwd()), os.path.expanduser(path)))
