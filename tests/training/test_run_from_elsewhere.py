"""What a run wrote down holds from every directory, whichever it was started in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w

import lorakit
from lorakit.cli import main
from lorakit.data.files import find_local_files
from lorakit.errors import UserError
from lorakit.local_paths import absolute_data_path, absolute_path, absolute_where_it_exists

RELATIVE = {
    "output": "runs/tiny",
    "model": {"path": "models/tiny"},
    "data": {"path": "rows/*.jsonl"},
    "training": {"max_steps": 2, "epochs": 2},
}


@pytest.fixture
def project(
    make_recipe: Callable[..., str], checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> Callable[..., Path]:
    """`project(adapter={...}, ...)` is the working directory, and has a recipe all of whose
    paths are relative to it."""

    def project(**sections: Any) -> Path:
        file = Path(make_recipe(**sections).rpartition(":")[0])
        (table,) = tomli.loads(file.read_text(encoding="utf-8")).values()
        for key, value in RELATIVE.items():
            table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
        # Letters that mean something in a glob.
        folder = tmp_path / "project [1]"
        (folder / "rows").mkdir(parents=True)
        shutil.move(file.parent / "data.jsonl", folder / "rows" / "all.jsonl")
        shutil.copytree(checkpoint, folder / "models" / "tiny")
        (folder / "recipes.toml").write_text(tomli_w.dumps({"tiny": table}), encoding="utf-8")
        monkeypatch.chdir(folder)
        return folder

    return project


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    def elsewhere() -> Path:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        return tmp_path / "elsewhere"

    return elsewhere


LONGER = {"training.max_steps": 4}


def test_a_run_is_resumed_by_its_own_recipe(
    project: Callable[..., Path], elsewhere: Callable[[], Path]
) -> None:
    run = project() / lorakit.train("recipes.toml:tiny").output
    elsewhere()
    again = lorakit.train(f"{run}/recipe.toml:tiny", resume=True, overrides=LONGER)
    assert (again.steps, again.output) == (4, run)


def test_a_run_is_resumed_by_a_recipe_that_names_the_same_files_otherwise(
    project: Callable[..., Path], elsewhere: Callable[[], Path]
) -> None:
    folder = project()
    lorakit.train("recipes.toml:tiny")
    elsewhere().joinpath("link").symlink_to(folder)
    changes = {"model.path": "../elsewhere/link/models/tiny/", "data.path": "link/rows", **LONGER}
    again = lorakit.train(
        "link/recipes.toml:tiny", resume=True, output="link/runs/tiny", overrides=changes
    )
    assert again.steps == 4


def test_another_model_of_the_same_name_is_refused(
    project: Callable[..., Path], elsewhere: Callable[[], Path]
) -> None:
    folder = project()
    lorakit.train("recipes.toml:tiny")
    shutil.copytree(folder / "models", elsewhere() / "models")
    shutil.copytree(folder / "rows", "rows")
    with pytest.raises(UserError, match=r"1 problem\n  model\.path: the run was started with"):
        lorakit.train(f"{folder}/recipes.toml:tiny", resume=True, output=folder / "runs/tiny")


def test_data_that_was_moved_is_taken_where_it_is_now(
    project: Callable[..., Path], elsewhere: Callable[[], Path]
) -> None:
    folder = project()
    run = folder / lorakit.train("recipes.toml:tiny").output
    shutil.move(folder / "rows" / "all.jsonl", elsewhere() / "moved.jsonl")
    own = f"{run}/recipe.toml:tiny"
    with pytest.raises(UserError, match="no file matches"):
        lorakit.train(own, resume=True)
    changes = {"data.path": "moved.jsonl", **LONGER}
    assert lorakit.train(own, resume=True, overrides=changes).steps == 4
    text = Path("moved.jsonl").read_text(encoding="utf-8")
    Path("moved.jsonl").write_text(text.replace("the", "these"), encoding="utf-8")
    with pytest.raises(UserError, match="the data is not what the run was started with"):
        lorakit.train(own, resume=True, overrides=changes)


def test_merging_a_qlora_run_finds_the_data_it_compares_on(
    project: Callable[..., Path], elsewhere: Callable[[], Path], capsys: Any
) -> None:
    run = project(quantization={"name": "nf4"}) / lorakit.train("recipes.toml:tiny").output
    elsewhere()
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(run), "--output", "merged"])
    told = capsys.readouterr()
    assert not ended.value.code, told.err
    assert "into the original weights" in told.out
    assert "not known" not in told.out


def test_a_run_that_goes_on_from_an_adapter_finds_it(
    project: Callable[..., Path], elsewhere: Callable[[], Path]
) -> None:
    folder = project()
    lorakit.train("recipes.toml:tiny")
    second = {"adapter.path": "runs/tiny", "output": "runs/second"}
    run = folder / lorakit.train("recipes.toml:tiny", overrides=second).output
    elsewhere()
    assert lorakit.train(f"{run}/recipe.toml:tiny", resume=True, overrides=LONGER).steps == 4


def test_a_logger_goes_on_where_it_was(
    project: Callable[..., Path], elsewhere: Callable[[], Path]
) -> None:
    folder = project(loggers=[{"name": "tensorboard", "log_dir": "boards"}])
    run = folder / lorakit.train("recipes.toml:tiny").output
    there = elsewhere()
    lorakit.train(f"{run}/recipe.toml:tiny", resume=True, overrides=LONGER)
    assert len(list((folder / "boards").iterdir())) == 2
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("path", ["owner/name", "owner/name@main", "lorakit:about_lorakit.jsonl"])
def test_what_is_on_no_disk_of_the_user_stays(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_data_path(path) == absolute_where_it_exists(path) == path
    assert absolute_where_it_exists("") == ""
    # But for a directory that is called as a hub's would be: that wins.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    here = str(tmp_path / "owner" / "name")
    assert absolute_data_path("owner/name") == absolute_where_it_exists("owner/name") == here


@pytest.mark.parametrize("folder", ["plain", "a [b] c", "*"])
@pytest.mark.parametrize(
    "path", ["one.jsonl", "./one.jsonl", "../{}/one.jsonl", "o*.jsonl", "~/one.jsonl", "**/o?e.*"]
)
def test_a_data_path_finds_the_same_file_from_everywhere(
    path: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / folder
    home.mkdir()
    (tmp_path / "blob").write_text("{}")
    (home / "one.jsonl").symlink_to(tmp_path / "blob")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    absolute = absolute_data_path(path.format(folder))
    monkeypatch.chdir(tmp_path)
    (found,) = find_local_files(absolute)
    assert found.path == home / "one.jsonl"
    assert absolute_data_path(absolute) == absolute


def test_a_link_among_the_directories_is_followed_before_going_up(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    up = f"{tmp_path}/link/.."
    assert absolute_path(up) == str(tmp_path / "far")
    assert os.path.samefile(absolute_path(f"{up}/away"), up + "/away")
