"""Junk in a recipe never raises anything but a RecipeError, each line of which names a key."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from lorakit.catalog import Catalog, load_catalog
from lorakit.errors import RecipeError
from lorakit.recipes import resolve_table

SHIPPED = "lorakit:about_lorakit.jsonl"
SECTIONS = [
    "model",
    "adapter",
    "optimizer",
    "precision",
    "data",
    "checkpointer",
    "quantization",
    "schedule",
    "training",
    "evaluation",
    "samples",
    "loggers",
    "output",
    "seed",
    "device",
    "summary",
]
words = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
KEYS = words | st.sampled_from(
    [
        "name",
        "path",
        "rank",
        "alpha",
        "targets",
        "lr",
        "betas",
        "max_seq_len",
        "column",
        "epochs",
        "prompts",
        "every_steps",
        "fraction",
        "split",
        "files",
    ]
)


@lru_cache
def catalog() -> Catalog:
    return load_catalog()


def valid_table() -> dict[str, Any]:
    return {
        "output": "out",
        "model": {"name": "llama", "path": "."},
        "data": {"name": "messages", "path": SHIPPED},
        "adapter": {"name": "lora"},
        "optimizer": {"name": "adamw"},
    }


def check_only_recipe_errors(table: dict[str, Any]) -> None:
    problems, lines = [], [""]
    try:
        resolve_table("junk", table, catalog())
    except RecipeError as error:
        problems, lines = list(error.problems), str(error).split("\n")
    assert lines[1:] == [f"  {problem}" for problem in problems]
    for problem in problems:
        key = re.match(r"([a-z_]+)[\w.\[\]]*: ", problem)
        assert key, problem
        assert key[1] in {*SECTIONS, *table}


@given(st.dictionaries(st.sampled_from(SECTIONS) | words, junk, max_size=6))
def test_junk_for_sections(table: dict[str, Any]) -> None:
    check_only_recipe_errors({**valid_table(), **table})


@given(st.sampled_from(SECTIONS[:11]), st.dictionaries(KEYS, junk, max_size=4))
def test_junk_within_a_section(section: str, values: dict[str, Any]) -> None:
    table = valid_table()
    table[section] = {**table.get(section, {}), **values}
    check_only_recipe_errors(table)


@given(st.text())
@example("\0")
@example("nowhere\nat all")
@example("~nobody-of-this-name/x.jsonl")
@example("x" * 5000 + ".jsonl")
@example("lorakit:")
@example("lorakit:../datasets/\0.jsonl")
@example("pypi:\0")
def test_junk_for_paths(path: str) -> None:
    table = valid_table()
    for section in ("model", "data", "evaluation"):
        check_only_recipe_errors({**table, section: {**table.get(section, {}), "path": path}})
