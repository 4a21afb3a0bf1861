"""Rows that a run is measured by and not trained on: another file's, or a share of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, evolve

from lorakit.catalog import Catalog
from lorakit.data.batches import Batches, pack
from lorakit.data.dataset import Dataset, Report, load_dataset
from lorakit.data.files import TRAIN, of_section
from lorakit.data.tokenizer import Tokenizer
from lorakit.errors import UserError, listing
from lorakit.options import DataOptions, EvaluationOptions
from lorakit.protocols import Progress
from lorakit.records import DatasetFormat

if TYPE_CHECKING:
    from lorakit.recipes import Recipe


@define
class EvaluationSet(Batches):
    """What a model is evaluated over.

    Attributes:
        dataset: Its examples.
        micro_batches: The examples' indices in each.
    """

    micro_batches: tuple[tuple[int, ...], ...]

    @classmethod
    def packed(
        cls, dataset: Dataset, tokens: int, *, share_prefixes: bool = False, threads: int = 1
    ) -> EvaluationSet:
        """In micro-batches of whole examples of up to so many tokens together; a longer example
        is alone in its own."""
        lengths = [len(example) for example in dataset.examples]
        alone = [(index,) for index, length in enumerate(lengths) if length > tokens]
        others = (index for index, length in enumerate(lengths) if length <= tokens)
        rows = (*pack(others, lengths, tokens), *alone)
        return cls(dataset, rows, share_prefixes=share_prefixes, threads=threads)


def load_datasets(
    recipe: Recipe, tokenizer: Tokenizer, progress: Progress
) -> tuple[Dataset, Dataset | None]:
    """What the recipe trains on, and what it is evaluated over, if anything.

    Args:
        recipe: Resolved.
        tokenizer: With the template training uses.
        progress: Counts rows.

    Raises:
        UserError: As `load_dataset`, of either; or there are too few rows to hold one out.
    """
    form, data, options = recipe.data.record, recipe.data.options, recipe.evaluation
    dataset = load_dataset(form, data, tokenizer, progress, catalog=recipe.catalog)
    if options is None:
        return dataset, None
    if options.fraction is not None:
        return hold_out(dataset, options, recipe.run.seed)
    others = load_evaluation(form, data, options, tokenizer, progress, catalog=recipe.catalog)
    return dataset, others


def load_evaluation(
    form: DatasetFormat,
    data: DataOptions,
    options: EvaluationOptions,
    tokenizer: Tokenizer,
    progress: Progress,
    *,
    catalog: Catalog,
) -> Dataset:
    """The rows that `evaluation.path`, `split` and `files` name, read as the training rows are.

    Raises:
        UserError: As `load_dataset`.
    """
    named = evolve(
        data,
        path=options.path or data.path,
        split=options.split or TRAIN,
        files=options.files,
    )
    try:
        return load_dataset(
            form, named, tokenizer, progress, first=options.max_rows, catalog=catalog
        )
    except UserError as error:
        raise of_section(error, "evaluation") from None


def hold_out(dataset: Dataset, options: EvaluationOptions, seed: int) -> tuple[Dataset, Dataset]:
    """The data set without the rows that `evaluation.fraction` holds out, and those, both in the
    file's order.

    Raises:
        UserError: There is only one row.
    """
    count = len(dataset.examples)
    if count < 2:
        raise UserError(
            "evaluation.fraction: the data have only one row, and none would be left to train on",
            "Give rows of their own by evaluation.path.",
        )
    wanted = max(1, round(count * (options.fraction or 0.0)))
    if options.max_rows:
        wanted = min(wanted, options.max_rows)
    generator = torch.Generator()
    # As of an epoch before the first: no epoch's order is this one.
    generator.manual_seed(seed * 1_000_003 - 1)
    order = [int(i) for i in torch.randperm(count, generator=generator)]
    held = set(order[: min(wanted, count - 1)])
    kept = [i for i in range(count) if i not in held]
    report = evolve(dataset.report, rows=dataset.report.rows - len(held))
    # What was cut or left out is told once, of all rows together.
    others = Report(files=dataset.report.files, rows=len(held))
    return _of_rows(dataset, kept, report), _of_rows(dataset, sorted(held), others)


def _of_rows(dataset: Dataset, rows: Sequence[int], report: Report) -> Dataset:
    examples = tuple(dataset.examples[i] for i in rows)
    counted = evolve(
        report,
        tokens=sum(len(e) for e in examples),
        trained_tokens=sum(e.targets for e in examples),
        lengths=[len(e) for e in examples],
    )
    return Dataset(examples, tuple(dataset.where[i] for i in rows), counted)


def evaluation_lines(
    options: EvaluationOptions, data: DataOptions, evaluated: Dataset, trained: Dataset
) -> list[str]:
    """For the log: what the run is evaluated over and when, and what is wrong with that."""
    report = evaluated.report
    rows = f"{len(evaluated.examples):,} row{'s' if len(evaluated.examples) > 1 else ''}"
    origin = f"of {options.path or data.path}" + (f", {options.split}" if options.split else "")
    if options.fraction is not None:
        origin = "held out of training"
    times = ["at the start"] * options.at_start
    times += [f"every {options.every_steps:,} steps"] * bool(options.every_steps)
    times.append("at each epoch's end")
    text = (
        f"evaluation: {rows} {origin}, {report.tokens:,} tokens, of which "
        f"{report.trained_tokens:,} count; {listing(times)}"
    )
    lines = ["; ".join([text, *report.losses(data.max_seq_len)])]
    wanted = {bytes(e.ids) for e in evaluated.examples}
    seen = {ids for e in trained.examples if (ids := bytes(e.ids)) in wanted}
    repeated = sum(bytes(e.ids) in seen for e in evaluated.examples)
    if repeated:
        lines.append(
            f"evaluation: {repeated:,} of the {rows} are trained on too, and say nothing of how "
            "unseen rows fare"
        )
    return lines
