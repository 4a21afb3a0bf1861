"""A run has its directory to itself, and finds it again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit
from lorakit import run_directory
from lorakit.errors import UserError
from lorakit.recipes import resolve_recipe
from lorakit.run import dry_run
from lorakit.run_directory import LOCK, occupied


def test_another_process_is_kept_out(tmp_path):
    """Also from taking over where the first has written nothing yet."""
    run = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from lorakit.run_directory import free_output\n"
        "from lorakit.run_directory import occupied\n"
        "path = Path(sys.argv[1]); print(free_output(path, False))\n"
        "with occupied(path): pass"
    )
    command = [sys.executable, "-c", code, str(run)]
    with occupied(run):
        other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.stdout.strip() == f"{run}-2"
    assert f"{run} is in use by another lorakit process" in other.stderr
    assert not run.exists(), "nothing was written"
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_run_that_is_under_way_is_not_resumed(make_recipe):
    recipe = make_recipe(training={"max_steps": 1})
    run = lorakit.train(recipe).output
    with occupied(run), pytest.raises(UserError, match="in use"):
        lorakit.train(recipe, resume=True)
    assert not (run / LOCK).exists()


def test_a_run_that_has_saved_nothing_yet_is_in_use_all_the_same(make_recipe):
    recipe = make_recipe(training={"max_steps": 1})
    run = lorakit.train(recipe).output
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no complete checkpoint"):
        lorakit.train(recipe, resume=True)
    with occupied(run), pytest.raises(UserError, match="in use by another"):
        lorakit.train(recipe, resume=True)


def test_a_run_directory_that_is_not_there_names_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run directory runs/mien \(did you mean 'mine'"):
        lorakit.train("runs/mien", resume=True)


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks")])
def test_a_file_system_without_locks_trains(error, make_recipe, monkeypatch):
    def refused(self):
        raise error

    monkeypatch.setattr(run_directory.FileLock, "acquire", refused)
    recipe = make_recipe(training={"max_steps": 1})
    lorakit.train(recipe)
    assert lorakit.train(recipe, resume=True).steps == 1


def test_files_of_others_are_not_mixed_with_a_runs(make_recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"is not empty and holds no run: there is thesis\.tex"):
        lorakit.train(make_recipe(), output=tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_run_that_was_moved_goes_on_where_it_is(make_recipe, tmp_path, read_metrics):
    recipe = make_recipe(training={"max_steps": 2})
    first = lorakit.train(recipe).output
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(first, moved)
    before = (first / "metrics.jsonl").read_bytes()
    for reference in (str(moved / "recipe.toml"), str(moved)):
        done = lorakit.train(reference, resume=True, overrides={"training.max_steps": 3})
        assert done.output == moved
    assert read_metrics(moved)[-1]["step"] == 3
    assert (first / "metrics.jsonl").read_bytes() == before


def test_an_end_that_is_passed_is_refused(make_recipe):
    recipe = make_recipe(training={"max_steps": 3})
    run = lorakit.train(recipe).output
    kept = (run / "recipe.toml").read_bytes()
    with pytest.raises(UserError, match="has done 3 steps, and the recipe now ends after 2"):
        lorakit.train(recipe, resume=True, overrides={"training.max_steps": 2})
    assert (run / "recipe.toml").read_bytes() == kept


def test_a_dry_run_says_what_the_run_would(make_recipe):
    recipe = make_recipe(training={"max_steps": 1})
    run = lorakit.train(recipe).output
    with pytest.raises(UserError, match="holds a run already"):
        dry_run(resolve_recipe(recipe, output=run), fixed_output=True)
    told = "\n".join(dry_run(resolve_recipe(recipe)))
    assert f"{run} holds a run already (--resume continues it); using {run}-2" in told


def test_no_answers_of_before_after_a_resume_that_has_none(make_recipe, capsys):
    """The base model is there no more: its answers cannot be had."""
    recipe = make_recipe(training={"max_steps": 1})
    lorakit.train(recipe)
    samples = {"samples.prompts": ["how?"], "training.max_steps": 2}
    run = lorakit.train(recipe, resume=True, overrides=samples).output
    (answer,) = json.loads((Path(run) / "samples.json").read_text())
    assert answer["before"] == ""
    assert answer["after"]
    told = capsys.readouterr()
    assert "before" not in told.out + told.err
