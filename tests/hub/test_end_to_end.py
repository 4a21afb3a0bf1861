"""A run whose model and data come from a hub, by the environment alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.recipes import resolve_recipe

MakeRecipe = Callable[..., str]


@pytest.fixture
def on_the_hub(hub: Any, checkpoint: Path, make_rows: Callable[..., Any]) -> Any:
    """`acme/tiny`, a checkpoint, and `acme/chats`, a split of two files."""
    hub.add_directory("models/acme/tiny", checkpoint)
    lines = [json.dumps(row).encode() for row in make_rows(12)]
    files = {
        "train-0.jsonl": b"\n".join(lines[:6]),
        "train-1.jsonl": b"\n".join(lines[6:]),
        "test.jsonl": lines[0],
        "README.md": b"---\nlicense: mit\n---\n",
    }
    hub.add("datasets/acme/chats", files)
    return hub


def test_a_run_from_the_hub_is_the_run_from_local_files(
    on_the_hub: Any, make_recipe: MakeRecipe, checkpoint: Path, offline: Callable[[], None]
) -> None:
    here = lorakit.train(make_recipe())
    reference = make_recipe(model="acme/tiny@v1", data={"path": "acme/chats"})
    there = lorakit.train(reference)
    weights = "adapter/adapter_model.safetensors"
    assert (there.output / weights).read_bytes() == (here.output / weights).read_bytes()
    config = json.loads((there.output / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", "v1")
    assert "test.jsonl" not in on_the_hub.fetched()

    asked = len(on_the_hub.log)
    offline()
    again = lorakit.train(reference)
    assert (again.output / weights).read_bytes() == (here.output / weights).read_bytes()
    assert len(on_the_hub.log) == asked


def test_an_adapter_finds_its_base_on_the_hub_again(
    on_the_hub: Any, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    from lorakit.mergeable import merge_trained

    run = lorakit.train(make_recipe(model="acme/tiny@v1")).output
    # Another machine has the adapter, and nothing of the model.
    (tmp_path / "hf").rename(tmp_path / "elsewhere")
    on_the_hub.log.clear()
    merge_trained(str(run / "adapter"), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert on_the_hub.log[0] == "GET api/models/acme/tiny/revision/v1"


def test_checking_a_recipe_asks_nobody(on_the_hub: Any, make_recipe: MakeRecipe) -> None:
    resolve_recipe(make_recipe(model="acme/none", data={"path": "acme/none"}))
    assert on_the_hub.log == []


SCRIPT = """
import atexit, sys
atexit.register(lambda: print([m for m in ("torch", "huggingface_hub", "pyarrow")
                               if m in sys.modules], file=sys.stderr))
from lorakit.cli import main
main(sys.argv[1:])
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_command_line_honours_the_environment(
    on_the_hub: Any, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    on_the_hub.gated.add("models/acme/tiny")
    reference = make_recipe(model="acme/tiny", data={"path": "acme/chats"})
    done = run("recipes", "validate", reference)
    assert (done.returncode, done.stderr) == (0, "[]\n")

    home = tmp_path / "another"
    token = {"HF_TOKEN": "hf_good", "HF_HOME": str(home)}
    done = run("train", reference, "--dry-run", **token)
    assert done.returncode == 0, done.stderr
    assert "data: 12 rows of 2 files" in done.stdout
    assert (home / "hub" / "models--acme--tiny").is_dir()
