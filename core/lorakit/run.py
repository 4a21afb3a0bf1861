"""A run, from a resolved recipe to the results in its directory."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from lorakit.arena import give_back_memory
from lorakit.assemble import Run, assemble, describe
from lorakit.compilation import compilation_told
from lorakit.errors import Interrupted
from lorakit.evaluation import Evaluation, results_lines
from lorakit.interrupts import saved_steps_told, stop_on_signals
from lorakit.logs import LoggerGroup
from lorakit.loop import Limits, Result, train, trainable_parameters
from lorakit.optimizer import build_optimizer
from lorakit.profiling import profiled
from lorakit.progress import TerminalProgress
from lorakit.protocols import Progress, RunInfo, SnapshotStore
from lorakit.recipes import Recipe
from lorakit.results import summary, write_merged, write_results
from lorakit.run_directory import (
    MERGED,
    PROFILE,
    RECIPE,
    check_not_over,
    check_resumable,
    free_output,
    occupied,
    write_recipe,
)
from lorakit.samples import Samples
from lorakit.schedule import lr_factor
from lorakit.snapshot import restore_snapshot, take_snapshot
from lorakit.state import EvaluationState, TrainState


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    fixed_output: bool = False,
    check_memory: bool = True,
) -> Result:
    """Trains a resolved recipe and writes its run directory.

    Args:
        recipe: See `lorakit.recipes.resolve_recipe`.
        resume: Continue the run in the output directory, from its last checkpoint.
        fixed_output: The user named the output directory: it is an error for it to hold another
            run.  Else the next free name beside it is taken.
        check_memory: Refuse a run that cannot fit in memory.

    Raises:
        UserError: The recipe's data, model or output is wrong, or the run cannot fit.
        RunError: The run failed.
        Interrupted: A signal stopped it; it was saved, unless there was nothing to save yet.
    """
    recipe, notices = _with_output(recipe, resume=resume, fixed=fixed_output)
    store = _open_store(recipe)
    state = TrainState()
    with occupied(recipe.output), saved_steps_told(store, state, _going_on(recipe)):
        return _run(recipe, store, state, notices, resume=resume, check_memory=check_memory)


def _with_output(recipe: Recipe, *, resume: bool, fixed: bool) -> tuple[Recipe, list[str]]:
    """The recipe with the directory it goes to, and what the user should know of that."""
    if resume:
        check_resumable(recipe, _open_store(recipe))
        return recipe, []
    output = free_output(recipe.output, fixed)
    if output == recipe.output:
        return recipe, []
    notice = f"output: {recipe.output} holds a run already (--resume continues it); using {output}"
    return recipe.with_output(output), [notice]


def _run(
    recipe: Recipe,
    store: SnapshotStore,
    state: TrainState,
    notices: Sequence[str],
    *,
    resume: bool,
    check_memory: bool,
) -> Result:
    progress = TerminalProgress()
    run = assemble(recipe, progress, check_memory=check_memory)
    run.notices.extend(notices)
    evaluated = EvaluationState()
    optimizer = build_optimizer(
        recipe.optimizer.record,
        recipe.optimizer.options,
        trainable_parameters(run.base.model),
    )
    if resume and store.steps():
        restore_snapshot(run, optimizer, state, evaluated, store.load(store.steps()[-1]))
        check_not_over(state.step, run.total_steps)
    write_recipe(recipe)

    with LoggerGroup.open(recipe.loggers, recipe.output) as log:
        _announce(run, log)
        if state.step:
            log.notice(f"resuming after step {state.step} of {run.total_steps}")
        samples = Samples(recipe.samples, recipe.output, run.base.model, run.tokenizer)
        samples.before(log, resumed=state.step > 0)
        trained, everything = run.parameters
        log.start(
            RunInfo(
                recipe.name, recipe.output, recipe, state.step, run.total_steps, trained, everything
            )
        )
        saved = _fit(run, optimizer, state, evaluated, store, log, progress)
        # Its state is saved; merging needs the room.
        del optimizer
        give_back_memory()
        log.finish()
        write_results(run, progress)
        samples.after(log)
        kept = {step: saved.get(step, recipe.output) for step in store.steps()}
        log.notice(summary(run, state, results_lines(evaluated, kept)))
    return Result(recipe.output, state.step, state.loss, evaluated.loss)


def _announce(run: Run, log: LoggerGroup) -> None:
    for line in describe(run):
        log.notice(line)


def _open_store(recipe: Recipe) -> SnapshotStore:
    section = recipe.checkpointer
    store: SnapshotStore = section.record.open(recipe.output, section.options)
    return store


def _fit(
    run: Run,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    evaluated: EvaluationState,
    store: SnapshotStore,
    log: LoggerGroup,
    progress: Progress,
) -> dict[int, Path]:
    """Trains; returns where this session's checkpoints went, by step."""
    recipe = run.recipe
    saved: dict[int, Path] = {}
    peak = recipe.optimizer.options.lr
    keep = recipe.checkpointer.options

    def save(state: TrainState) -> None:
        saved[state.step] = store.save(take_snapshot(run, optimizer, state, evaluated))

    def epoch_done(state: TrainState) -> None:
        last = state.epoch == recipe.training.epochs
        if keep.save_merged_each_epoch and not last:
            give_back_memory()
            write_merged(run, recipe.output / f"{MERGED}-epoch-{state.epoch}", progress)

    left = run.total_steps - state.step
    with ExitStack() as around:
        stop = around.enter_context(stop_on_signals())
        evaluation = _evaluation(run, evaluated, log, stop)
        if recipe.training.profile:
            around.enter_context(profiled(optimizer, left, recipe.output / PROFILE, log))
        if recipe.training.compile:
            around.enter_context(compilation_told(optimizer, log))
        train(
            run.base.causal_lm,
            run.plan,
            optimizer,
            lambda step: peak * lr_factor(step, run.total_steps, recipe.schedule),
            run.precision,
            state,
            Limits(recipe.training.epochs, run.total_steps, keep.every_steps),
            device=run.device,
            max_grad_norm=recipe.training.max_grad_norm,
            log=log,
            evaluate=evaluation or _no_evaluation,
            save=save,
            epoch_done=epoch_done,
            stop=stop,
        )
    left_off = evaluation is not None and evaluation.is_due(state)
    if stop.is_set() and (state.step < run.total_steps or left_off):
        raise Interrupted(
            f"stopped at step {state.step} of {run.total_steps}, and saved; go on with: "
            f"{_going_on(recipe)}",
            stop.number,
        )
    return saved


def _evaluation(
    run: Run, evaluated: EvaluationState, log: LoggerGroup, stop: threading.Event
) -> Evaluation | None:
    options = run.recipe.evaluation
    if options is None or run.evaluation is None:
        return None
    return Evaluation(
        run.base.model,
        run.evaluation,
        options,
        run.total_steps,
        evaluated,
        device=run.device,
        log=log,
        stop=stop,
    )


def _no_evaluation(state: TrainState) -> bool:
    return False


def _going_on(recipe: Recipe) -> str:
    reference = shlex.quote(f"{recipe.output / RECIPE}:{recipe.name}")
    return f"lorakit train {reference} --resume"


def dry_run(recipe: Recipe, *, resume: bool = False, fixed_output: bool = False) -> list[str]:
    """Everything a run does before it loads weights; what it found, a line each.

    Raises:
        UserError: As `run_recipe` would.
    """
    recipe, notices = _with_output(recipe, resume=resume, fixed=fixed_output)
    return describe(assemble(recipe, TerminalProgress(), weights=False)) + notices
