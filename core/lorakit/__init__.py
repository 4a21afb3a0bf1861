"""lorakit fine-tunes large language models with LoRA on one device.

`import lorakit` is cheap: nothing here imports torch until `train` is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError, RunError, UserError
from lorakit.hookspecs import hookimpl

if TYPE_CHECKING:
    from lorakit.loop import Result

__version__ = "0.1.0"
__all__ = ["LorakitError", "RunError", "UserError", "__version__", "hookimpl", "train"]


def train(
    recipe: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    check_memory: bool = True,
) -> Result:
    """Trains a recipe, as `lorakit train` does.

    Args:
        recipe: `FILE.toml:NAME`, or `NAME` of a recipe that ships with lorakit.
        overrides: Values by dotted key, as `--set` gives them: `{"training.max_steps": 5}`.
        output: The run directory, instead of the recipe's `output`.
        resume: Continue the run in the output directory.
        check_memory: Refuse a run that cannot fit in memory.

    Returns:
        The result: `output` (the run directory), `steps` (optimizer steps done in all), `loss`
        (of the last step) and `eval_loss` (of the last evaluation; None without any).

    Raises:
        UserError: Something in the recipe, the data or the model is wrong.
        RunError: The run failed.
    """
    from lorakit.recipes import resolve_recipe
    from lorakit.run import run_recipe

    resolved = resolve_recipe(recipe, overrides=overrides, output=output)
    return run_recipe(
        resolved, resume=resume, fixed_output=output is not None, check_memory=check_memory
    )
