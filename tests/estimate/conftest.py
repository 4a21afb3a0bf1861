"""A recipe's parts as an estimate takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit.estimate.rehearsal import Rehearsal
from lorakit.recipes import resolve_recipe
from lorakit.weights.base import open_base

CPU = torch.device("cpu")


@pytest.fixture
def rehearse(make_recipe: Callable[..., str]) -> Callable[..., Rehearsal]:
    """`rehearse(training={...}, ...)` rehearses such a recipe, or a resolved one."""

    def rehearse(recipe: Any = None, **sections: Any) -> Rehearsal:
        recipe = recipe or resolve_recipe(make_recipe(**sections))
        base = open_base(recipe.output.__class__(recipe.model.options.path), recipe.catalog)
        precision = recipe.precision.record.resolve(CPU, recipe.precision.options)
        return Rehearsal(recipe, base, CPU, precision)

    return rehearse
