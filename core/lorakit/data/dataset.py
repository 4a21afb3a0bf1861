"""Data files as tokenized examples, with a report of what was cut or left out."""

from __future__ import annotations

from attrs import define, evolve, field, frozen

from lorakit.catalog import Catalog
from lorakit.data.encode import Encoded, encode_example
from lorakit.data.examples import make_example, other_formats
from lorakit.data.files import find_data_files
from lorakit.data.rows import Problem, Row, read_rows
from lorakit.data.tokenizer import Tokenizer
from lorakit.errors import UserError
from lorakit.options import DataOptions
from lorakit.protocols import Progress
from lorakit.records import DatasetFormat

SHOWN_PROBLEMS = 10
"""Reading stops once so many rows are wrong: who has fixed those sees the next."""
DATA_NAME = 'data.name = "{}"'
"""How a recipe names a format."""


@frozen
class Dataset:
    """Tokenized examples in the order of the files.

    Attributes:
        examples: Those to train on.
        where: For each, the file and the place in it that it came from.
        report: What was cut or left out.
    """

    examples: tuple[Encoded, ...]
    where: tuple[str, ...]
    report: Report


@define
class Report:
    """Counts over the data files.

    Attributes:
        files: How many there are.
        rows: Rows in them.
        tokens: Tokens that remain.
        trained_tokens: Those of them with a label.
        truncated: Rows whose end was cut off.
        dropped: Rows left out because they were too long.
        untrained: Rows left out because nothing trained was left of them once they were cut.
    """

    files: int = 1
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    untrained: int = 0
    lengths: list[int] = field(factory=list, repr=False)

    def sentence(self, max_seq_len: int) -> str:
        """For the log: what the run trains on."""
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        files = f" of {self.files:,} files" if self.files > 1 else ""
        text = (
            f"data: {self.rows:,} rows{files}, {self.tokens:,} tokens, of which "
            f"{self.trained_tokens:,} ({share:.0%}) are trained; longest row {max(self.lengths):,}"
        )
        return "; ".join([text, *self.losses(max_seq_len)])

    def losses(self, max_seq_len: int) -> list[str]:
        """What was cut or left out, each as part of a sentence."""
        found = []
        if self.truncated:
            found.append(f"{self.truncated:,} rows cut to {max_seq_len:,} tokens")
        if self.dropped:
            found.append(f"{self.dropped:,} rows over {max_seq_len:,} tokens left out")
        if self.untrained:
            found.append(
                f"{self.untrained:,} rows left out, of which no trained token remains once they "
                f"are cut to {max_seq_len:,}"
            )
        return found


def load_dataset(
    form: DatasetFormat,
    options: DataOptions,
    tokenizer: Tokenizer,
    progress: Progress,
    *,
    first: int = 0,
    catalog: Catalog | None = None,
    setting: str = DATA_NAME,
) -> Dataset:
    """Reads and tokenizes the data files of a recipe.

    Args:
        form: Makes an example of a row.
        options: The recipe's section.
        tokenizer: With the template training uses.
        progress: Counts rows.
        first: Stop once there are so many examples; 0 reads all.
        catalog: Of formats to name where the rows are another's; None names none.
        setting: How the user names a format, with `{}` for it.

    Raises:
        UserError: Rows are malformed, or have no trained token; one message names the first
            ten of them.  Or the format is wrong.
    """
    files = find_data_files(options.path, progress, split=options.split, pattern=options.files)
    examples: list[Encoded] = []
    places: list[str] = []
    problems: list[Problem] = []
    report = Report(files=len(files))
    first_row = ""
    with progress.task("tokenizing", unit="rows") as task:
        for row in read_rows(files):
            report.rows += 1
            task.advance()
            if isinstance(row, Row):
                first_row = first_row or row.where
                example = _example(row, form, options, tokenizer, report)
                if isinstance(example, Problem) and not examples:
                    example = _with_fix(example, row, form, catalog, setting)
                if isinstance(example, Encoded):
                    examples.append(example)
                    places.append(row.where)
            else:
                example = row
            if isinstance(example, Problem):
                problems.append(example)
            if len(problems) == SHOWN_PROBLEMS or (first and len(examples) == first):
                break
    if problems:
        raise _together(problems)
    if not examples:
        raise _nothing_left(options, report, first_row)
    return Dataset(tuple(examples), tuple(places), report)


def _example(
    row: Row,
    form: DatasetFormat,
    options: DataOptions,
    tokenizer: Tokenizer,
    report: Report,
) -> Encoded | Problem | None:
    """The row tokenized; None if it is left out."""
    try:
        example = make_example(form, row.values, options, row.where)
        encoded = encode_example(example, tokenizer, train_on_prompt=options.train_on_prompt)
    except ValueError as error:
        return Problem(f"{row.where}: {error}")
    try:
        return _fit(encoded, options, row.where, report)
    except UserError as error:
        return Problem(error.message, error.fix)


def _with_fix(
    problem: Problem, row: Row, form: DatasetFormat, catalog: Catalog | None, setting: str
) -> Problem:
    """The problem with what may be the matter with all rows: they are another format's, or what
    the file holds are no rows."""
    names = other_formats(row.values, form, catalog) if catalog else []
    fix = problem.fix or row.doubt
    if names and not problem.fix:
        settings = " or ".join(setting.format(name) for name in names)
        fix = f"The row fits another format: use {settings}."
    return evolve(problem, fix=fix)


def _together(problems: list[Problem]) -> UserError:
    if len(problems) == 1:
        return UserError(problems[0].message, problems[0].fix)
    count = f"the first {len(problems)}" if len(problems) == SHOWN_PROBLEMS else str(len(problems))
    lines = "\n".join(f"  {problem.message}" for problem in problems)
    fixes = dict.fromkeys(problem.fix for problem in problems if problem.fix)
    return UserError(f"data: {count} problems:\n{lines}", "\n  ".join(fixes))


def _nothing_left(options: DataOptions, report: Report, first_row: str) -> UserError:
    """The message where each row was left out."""
    if report.untrained:
        others = f", and so with all {report.rows:,} rows" if report.rows > 1 else ""
        return UserError(
            f"{first_row}: no trained token is left once the row is cut to "
            f"{options.max_seq_len} tokens{others}",
            "Raise data.max_seq_len.",
        )
    return UserError(
        f"{options.path}: no row is left: all {report.rows} are over {options.max_seq_len} tokens",
        "Raise data.max_seq_len, or set data.too_long to 'truncate'.",
    )


def _fit(encoded: Encoded, options: DataOptions, where: str, report: Report) -> Encoded | None:
    if not encoded.targets:
        raise UserError(
            f"{where}: no token of this row is trained",
            "Give it an assistant turn that is not empty, or leave the row out.",
        )
    if len(encoded) > options.max_seq_len:
        if options.too_long == "error":
            raise UserError(
                f"{where}: {len(encoded)} tokens, but data.max_seq_len is {options.max_seq_len}",
                "Raise it, or set data.too_long to 'truncate' or 'drop'.",
            )
        if options.too_long == "drop":
            report.dropped += 1
            return None
        encoded = encoded.truncated(options.max_seq_len)
        if not encoded.targets:
            # Its prompt fills the row: one such row among thousands is no reason to stop.
            report.untrained += 1
            return None
        report.truncated += 1
    report.tokens += len(encoded)
    report.trained_tokens += encoded.targets
    report.lengths.append(len(encoded))
    return encoded
