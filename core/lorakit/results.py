"""What a run leaves behind: its adapter, the merged model, and how to use them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters import adapter_tensors, group_by_layer, write_adapter
from lorakit.local_paths import with_absolute_paths
from lorakit.merging import check_room, merge_adapter
from lorakit.protocols import BaseCheckpoint, Progress
from lorakit.recipes import Recipe, section_table
from lorakit.run_directory import ADAPTER, MERGED
from lorakit.state import TrainState
from lorakit.weights.shard_plan import plan_bytes, plan_shards

if TYPE_CHECKING:
    from lorakit.assemble import Run


def write_results(run: Run, progress: Progress) -> None:
    """Writes `adapter/` and, if the recipe asks for it, `merged/`."""
    write_adapter(
        run.recipe.output / ADAPTER,
        adapter_tensors(run.base.model, run.adapted),
        run.snapshot_config(),
        files=run.tokenizer.files,
        origin=_origin(with_absolute_paths(run.recipe)),
    )
    if run.recipe.checkpointer.options.save_merged:
        write_merged(run, run.recipe.output / MERGED, progress)


def check_room_for_merged(recipe: Recipe, base: BaseCheckpoint) -> None:
    """Refuses a run at whose end there would be no room for the merged model.

    Raises:
        UserError: The recipe asks for one, and the disk has too little left.
    """
    if recipe.checkpointer.options.save_merged:
        check_room(
            recipe.output / MERGED,
            plan_bytes(plan_shards(base)),
            "Set checkpointer.save_merged = false, or name an --output on another disk.",
        )


def write_merged(run: Run, directory: Path, progress: Progress) -> None:
    """Writes the base model with the adapter, as it is now, folded in."""
    adapter = run.recipe.adapter
    flat = adapter_tensors(run.base.model, run.adapted)
    merge_adapter(
        run.base.checkpoint,
        adapter.record,
        adapter.options,
        group_by_layer(flat, adapter.record.parameter_prefix, directory),
        directory,
        files=run.tokenizer.files,
        progress=progress,
        replace=True,
    )


def summary(run: Run, state: TrainState, evaluated: Sequence[str] = ()) -> str:
    """What the run came to, by its evaluations too, and what to do with it."""
    output = run.recipe.output
    quoted = shlex.quote(str(output))
    lines = [
        f"done: {state.step} steps, {state.tokens:,} tokens, last loss {state.loss:.4f}",
        *(f"  {line}" for line in evaluated),
        f"  adapter:         {output / ADAPTER}",
    ]
    if run.recipe.checkpointer.options.save_merged:
        lines.append(f"  merged model:    {output / MERGED}")
    else:
        merged = shlex.quote(str(output / MERGED))
        lines.append(f"  merge it:        lorakit merge {quoted} --output {merged}")
    lines.append(f"  serve with vLLM: {run.serving_advice()}")
    question = run.recipe.samples.prompts[0] if run.recipe.samples.prompts else "..."
    lines.append(f"  ask it yourself: lorakit generate {quoted} --prompt {_quoted(question)}")
    return "\n".join(lines)


def _quoted(question: str) -> str:
    """For a shell; in the quotes a reader expects where they keep the text as it is."""
    return shlex.quote(question) if re.search(r'["$`\\!]', question) else f'"{question}"'


def _origin(recipe: Recipe) -> Mapping[str, Any]:
    model = {"name": recipe.model.name, "path": recipe.model.options.path}
    if recipe.quantization is None:
        return {"model": model}
    return {"model": model, "quantization": section_table(recipe.quantization)}
