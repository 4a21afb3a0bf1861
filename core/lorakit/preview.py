"""The data as the model will see it, without loading a weight."""

from __future__ import annotations

from collections.abc import Iterator

from lorakit.base_model import open_base_model
from lorakit.context import rows_notice
from lorakit.data.encode import Encoded
from lorakit.data.evaluation_set import evaluation_lines, load_datasets
from lorakit.data.tokenizer import Tokenizer
from lorakit.progress import TerminalProgress
from lorakit.recipes import Recipe

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def preview_lines(recipe: Recipe, rows: int, *, color: bool) -> Iterator[str]:
    """A report, a histogram of lengths, and the first rows with their trained tokens marked:
    green on a terminal, in « » elsewhere.

    Raises:
        UserError: As training would.
    """
    progress = TerminalProgress()
    data = recipe.data.options
    base = open_base_model(recipe.model.options.path, recipe.catalog, progress, family=recipe.model)
    tokenizer = base.tokenizer.with_template(data.chat_template)
    dataset, evaluated = load_datasets(recipe, tokenizer, progress)
    lengths = dataset.report.lengths
    yield dataset.report.sentence(data.max_seq_len)
    if recipe.evaluation is not None and evaluated is not None:
        yield from evaluation_lines(recipe.evaluation, data, evaluated, dataset)
    if notice := rows_notice(lengths, base.checkpoint.config, data.max_seq_len):
        yield notice
    yield from histogram(lengths)
    for example, where in list(zip(dataset.examples, dataset.where, strict=True))[:rows]:
        yield f"\n{where}: {len(example)} tokens, {example.targets} trained"
        yield marked(example, tokenizer, color=color)


def histogram(lengths: list[int], bins: int = 8, width: int = 40) -> Iterator[str]:
    """How many rows have how many tokens."""
    low, high = min(lengths), max(lengths)
    size = max(1, -(-(high - low + 1) // bins))
    counts = [0] * bins
    for length in lengths:
        counts[(length - low) // size] += 1
    most = max(counts)
    for index, count in enumerate(counts):
        start = low + index * size
        if start <= high:
            bar = "#" * max(round(width * count / most), bool(count))
            yield f"  {start:>6}-{start + size - 1:<6} {count:>7}  {bar}"


def marked(example: Encoded, tokenizer: Tokenizer, *, color: bool) -> str:
    """The row's text with its trained tokens marked."""
    opening, closing = (GREEN, PLAIN) if color else ("«", "»")
    parts = []
    start = 0
    while start < len(example):
        end = start
        while end < len(example) and example.trained[end] == example.trained[start]:
            end += 1
        text = tokenizer.decode(example.ids[start:end], special=True)
        parts.append(f"{opening}{text}{closing}" if example.trained[start] else text)
        start = end
    return "".join(parts)
