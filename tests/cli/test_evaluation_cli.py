"""What a user sees of held-out evaluation: mistakes, what is to happen, what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli

from lorakit import evaluation
from lorakit.evaluation import results_lines
from lorakit.recipes import resolve_recipe
from lorakit.state import EvaluationState

Cli = Callable[..., Any]
MakeRecipe = Callable[..., str]
SHIPPED = "lorakit:about_lorakit.jsonl"
PRINTED = {"loggers": [{"name": "terminal"}, {"name": "disk"}], "training": {"epochs": 2}}


@pytest.fixture
def unseen(tmp_path: Path, make_rows: Callable[..., list[dict[str, Any]]]) -> Path:
    file = tmp_path / "unseen.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_rows(5, seed=9)))
    return file


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            {},
            "evaluation: set path (rows of their own) or fraction (the share of the training rows "
            "that is held out, such as 0.05)",
        ),
        ({"every_steps": 5}, "evaluation: set path (rows of their own) or fraction"),
        ({"path": SHIPPED, "fraction": 0.1}, "evaluation: set path or fraction, not both"),
        ({"fraction": 0.1, "split": "test"}, "evaluation: set split or fraction, not both"),
        ({"fraction": 0}, "evaluation.fraction: must be > 0.0: 0"),
        ({"fraction": 1.0}, "evaluation.fraction: must be < 1.0: 1.0"),
        ({"fraction": "a tenth"}, 'evaluation.fraction: expected a number, got "a tenth"'),
        ({"path": "unsen.jsonl"}, "evaluation.path: no file unsen.jsonl (did you mean"),
        (
            {"path": SHIPPED, "split": "test"},
            "evaluation.split: 'test' is of a data set on the hub",
        ),
        ({"split": "test"}, "evaluation.split: 'test' is of a data set on the hub, but eval"),
        ({"path": SHIPPED, "max_rows": -1}, "evaluation.max_rows: must be >= 0: -1"),
        ({"fraktion": 0.1}, "evaluation.fraktion: unknown key (did you mean 'fraction'?)"),
        ({"val_set_size": 0.1}, "evaluation.val_set_size: unknown key (did you mean 'fraction'?)"),
        (0.1, "evaluation: expected a table, got 0.1"),
    ],
)
def test_a_wrong_section_is_told_in_one_line(
    section: Any,
    problem: str,
    cli: Cli,
    make_recipe: MakeRecipe,
    unseen: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(unseen.parent)
    done = cli("recipes", "validate", make_recipe(evaluation=section))
    assert done.status == 2
    (line,) = [line.strip() for line in done.err.splitlines() if line.startswith("  ")]
    assert line.startswith(problem)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("val_set_size", "evaluation.fraction"),
        ("eval_steps", "evaluation.every_steps"),
        ("run_val_every_n_steps", "evaluation.every_steps"),
        ("eval", "evaluation"),
    ],
)
def test_other_trainers_names_are_told_as_ours(
    key: str, ours: str, cli: Cli, make_recipe: MakeRecipe
) -> None:
    done = cli("recipes", "validate", make_recipe(**{key: 5}))
    assert f"{key}: unknown key (did you mean '{ours}'?)" in done.err


def test_a_setting_adds_the_section(cli: Cli, make_recipe: MakeRecipe) -> None:
    reference = make_recipe(training={"max_steps": 1})
    done = cli("train", reference, "--set", "evaluation.fraction=0.25")
    assert done.status == 0, done.err
    file = Path(reference.rpartition("/")[0]) / "run" / "recipe.toml"
    (table,) = tomli.loads(file.read_text()).values()
    assert table["evaluation"]["fraction"] == 0.25
    assert table["evaluation"]["at_start"] is True
    assert resolve_recipe(f"{file}:tiny").table() == table


# ---------------------------------------------------------------- before a run


@pytest.mark.parametrize("command", [["preview"], ["train", "--dry-run"]])
def test_what_is_held_out_is_told_before(
    command: list[str], cli: Cli, make_recipe: MakeRecipe, unseen: Path
) -> None:
    reference = make_recipe()
    done = cli(*command, reference, "--set", "evaluation.fraction=0.25")
    assert done.status == 0, done.err
    assert "\ndata: 9 rows, " in "\n" + done.out
    assert "\nevaluation: 3 rows held out of training, " in done.out
    done = cli(*command, reference, "--set", f"evaluation.path={unseen}")
    assert "\ndata: 12 rows, " in "\n" + done.out
    assert f"\nevaluation: 5 rows of {unseen}, " in done.out
    assert "evaluation:" not in cli(*command, reference).out


def test_estimate_leaves_held_out_rows_out(cli: Cli, make_recipe: MakeRecipe, unseen: Path) -> None:
    reference = make_recipe()
    assert cli("estimate", reference, "--set", f"evaluation.path={unseen}").status == 0
    sizes = set()
    for seed in range(6):
        held = ("--set", "evaluation.fraction=0.9", "--set", f"seed={seed}")
        done = cli("estimate", reference, *held)
        assert done.status == 0, done.err
        sizes.add(done.out)
    # The longest of the few rows left is another with each seed.
    assert len(sizes) > 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"messages": []}'], "{file}, line 1: "),
        (['{"text": "plain"}'], "{file}, line 1: "),
        (["{"], "{file}, line 1: not valid JSON"),
        ([], "{file}: the file holds no row"),
        (
            ['{"messages": [{"role": "user", "content": "only a question"}]}'],
            "{file}, line 1: no token of this row is trained",
        ),
    ],
)
def test_wrong_rows_are_told_before_training(
    lines: list[str], said: str, cli: Cli, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    reference = make_recipe(evaluation={"path": str(file)})
    for command in (["train"], ["train", "--dry-run"], ["preview"]):
        done = cli(*command, reference)
        assert done.status == 2
        assert said.format(file=file) in done.err
        assert "Traceback" not in done.err
    assert not (Path(reference.rpartition("/")[0]) / "run" / "metrics.jsonl").exists()


def test_the_rows_are_read_by_the_recipes_data_options(
    cli: Cli, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    file = tmp_path / "long.jsonl"
    answer = {"role": "assistant", "content": "because " * 200}
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "why"}, answer]}) + "\n")
    reference = make_recipe(evaluation={"path": str(file)})
    done = cli("preview", reference)
    assert "evaluation: 1 row of " in done.out
    assert "; 1 rows cut to 128 tokens" in done.out
    done = cli("preview", reference, "--set", "data.too_long=drop")
    assert done.status == 2
    assert f"{file}: no row is left" in done.err


# ---------------------------------------------------------------- during and after a run


def test_the_terminal_has_a_line_for_each_evaluation(
    cli: Cli, make_recipe: MakeRecipe, unseen: Path, read_metrics: Callable[[Path], Any]
) -> None:
    reference = make_recipe(evaluation={"path": str(unseen)}, **PRINTED)
    done = cli("train", reference)
    assert done.status == 0, done.err
    found = re.findall(
        r"^eval at step (\d+)  loss (\S+)  perplexity (\S+?)(?:  (lowest.*))?$", done.out, re.M
    )
    lines = [
        m for m in read_metrics(Path(reference.rpartition("/")[0]) / "run") if "eval_loss" in m
    ]
    assert [(int(step), float(loss)) for step, loss, *_ in found] == [
        (m["step"], pytest.approx(m["eval_loss"], abs=5e-5)) for m in lines
    ]
    lowest = float("inf")
    for (_, _, _, said), m in zip(found, lines, strict=True):
        if lowest < float("inf"):
            assert said.startswith("lowest so far" if m["eval_loss"] < lowest else "lowest ")
        lowest = min(lowest, m["eval_loss"])
    assert re.search(r"^  eval loss \S+, the lowest ", done.out, re.M)


@pytest.mark.parametrize("keep", [True, False])
def test_overfitting_is_told_with_the_checkpoint_to_take(
    keep: bool,
    cli: Cli,
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([3.0, 2.0, 2.2, 2.3, 2.5])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: next(losses))
    reference = make_recipe(
        loggers=[{"name": "terminal"}],
        evaluation={"fraction": 0.1, "keep_best": keep},
        training={"epochs": 4, "batch_size": 20},
    )
    done = cli("train", reference)
    assert done.status == 0, done.err
    assert "eval at step 2  loss 2.2000  perplexity 9.03  lowest 2.0000 at step 1\n" in done.out
    assert "\n  eval loss 2.5000, the lowest was 2.0000 at step 1\n" in done.out
    place = Path(reference.rpartition("/")[0]) / "run" / "checkpoints" / "step-00000001"
    assert place.is_dir() == keep
    if keep:
        assert f"\n  the checkpoint of step 1 is kept: {place}\n" in done.out
        assert cli("generate", place, "--prompt", "why", "--max-new-tokens", 1).status == 0
    else:
        assert "\n  no checkpoint of step 1 is kept: evaluation.keep_best = true" in done.out


def test_a_loss_that_is_no_number_is_told_and_not_logged(
    cli: Cli,
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    read_metrics: Callable[[Path], Any],
) -> None:
    losses = iter([float("nan"), 2.0, float("inf")])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: next(losses))
    reference = make_recipe(evaluation={"fraction": 0.1}, **PRINTED)
    done = cli("train", reference)
    assert done.status == 0
    assert "eval at step 0: the loss is nan, and is not logged" in done.out
    lines = read_metrics(Path(reference.rpartition("/")[0]) / "run")
    assert [m["eval_loss"] for m in lines if "eval_loss" in m] == [2.0]


def test_what_the_report_says_of_evaluations() -> None:
    results = EvaluationState()
    assert results_lines(results, {}) == []
    results.add(0, 1.5)
    assert results_lines(results, {}) == ["eval loss 1.5000, the lowest of the run"]
    results.add(5, 1.505)
    # Higher, but by less than a hundredth of the perplexity.
    assert results_lines(results, {}) == ["eval loss 1.5050, the lowest was 1.5000 at step 0"]
    results.add(10, 2.0)
    assert results_lines(results, {})[1].startswith("before training it was lower")


def test_tensorboard_has_the_evaluations(
    cli: Cli, make_recipe: MakeRecipe, unseen: Path, read_metrics: Callable[[Path], Any]
) -> None:
    pytest.importorskip("lorakit_tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [{"name": "disk"}, {"name": "tensorboard"}]
    reference = make_recipe(evaluation={"path": str(unseen)}, loggers=loggers)
    assert cli("train", reference).status == 0
    run = Path(reference.rpartition("/")[0]) / "run"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = [(m["step"], m["eval_loss"]) for m in read_metrics(run) if "eval_loss" in m]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("eval_loss")] == logged
    assert len(logged) == 2
