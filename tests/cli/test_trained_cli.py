"""After a run: generate, merge, eval and preview; and what `train` does not overwrite."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli

Cli = Callable[..., Any]


@pytest.fixture
def run(train_run: Callable[..., Path]) -> Path:
    return train_run()


@pytest.fixture
def data(run: Path) -> Path:
    return run.parent / "data.jsonl"


def everything_in(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def generate(cli: Cli, path: Path, *more: object) -> str:
    done = cli("generate", path, "--prompt", "what?", "--max-new-tokens", 12, *more)
    assert done.status == 0, done.err
    return str(done.out)


def test_generate_draws_by_the_seed(cli: Cli, run: Path) -> None:
    drawn = [generate(cli, run, "--temperature", 2, "--seed", seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_generate_from_nothing(
    path: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("generate", path, "--prompt", "what?")
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err


def test_commands_told_are_a_shells(cli: Cli, make_recipe: Callable[..., str]) -> None:
    """In a directory with a space, and with a question that a shell would change."""
    reference = make_recipe(
        samples={"prompts": ["What is `$x`?"], "max_new_tokens": 1},
        loggers=[{"name": "terminal"}],
    )
    output = Path(reference.rpartition("/")[0]) / "sp ace ü"
    done = cli("train", reference, "--output", output)
    commands = [line.partition(": ")[2].strip() for line in done.out.splitlines()]
    told = [shlex.split(command) for command in commands if command.startswith("lorakit ")]
    assert told == [
        ["lorakit", "merge", str(output), "--output", str(output / "merged")],
        ["lorakit", "generate", str(output), "--prompt", "What is `$x`?"],
    ]


def test_merge(cli: Cli, run: Path, data: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = cli("merge", run, "--output", merged)
    assert done.status == 0
    advice, wrote = done.out.splitlines()
    assert advice.startswith("serve with vLLM: vllm serve ")
    assert wrote == f"wrote {merged}"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in merged.iterdir()
    }
    assert cli("eval", merged, "--data", data).out == cli("eval", run, "--data", data).out


def test_merge_of_no_run(cli: Cli, tmp_path: Path) -> None:
    done = cli("merge", tmp_path / "nowhere", "--output", tmp_path / "merged")
    assert done.status == 2
    assert f"{tmp_path / 'nowhere'} is no run and no adapter directory" in done.err
    assert list(tmp_path.iterdir()) == []


def test_eval(cli: Cli, run: Path, data: Path, checkpoint: Path) -> None:
    losses = []
    for path in (run, checkpoint):
        done = cli("eval", path, "--data", data)
        assert done.status == 0, done.err
        found = re.fullmatch(
            r"loss ([\d.]+)  perplexity [\d.]+  over [\d,]+ tokens of 12 rows\n", done.out
        )
        assert found, done.out
        losses.append(float(found[1]))
    assert losses[0] < losses[1]


def test_eval_of_an_unknown_format(cli: Cli, run: Path, data: Path) -> None:
    done = cli("eval", run, "--data", data, "--format", "mesages")
    assert done.status == 2
    assert "no dataset is called 'mesages' (did you mean 'messages'?)" in done.err


def test_a_second_run_takes_the_next_free_name(cli: Cli, make_recipe: Callable[..., str]) -> None:
    reference = make_recipe(training={"max_steps": 1})
    folder = Path(reference.removesuffix(":tiny")).parent
    assert cli("train", reference).status == 0
    first = everything_in(folder / "run")
    for name in ("run-2", "run-3"):
        assert cli("train", reference).status == 0
        recipe = tomli.loads((folder / name / "recipe.toml").read_text(encoding="utf-8"))
        assert recipe["tiny"]["output"] == str(folder / name)
        assert (folder / name / "adapter" / "adapter_model.safetensors").is_file()
    assert everything_in(folder / "run") == first


def test_set_reaches_the_run(cli: Cli, make_recipe: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "named"
    more = ["--set", 'adapter.targets=["q_proj"]', "--set", "training.max_steps=1"]
    assert cli("train", make_recipe(), *more, "--output", output).status == 0
    config = json.loads((output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["q_proj"]
    assert len((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "x"], "no command 'trian' (did you mean 'train'?)"),
        (["recipe", "list"], "no command 'recipe' (did you mean 'recipes'?)"),
        (["zzz"], "no command 'zzz'"),
    ],
)
def test_unknown_command(arguments: list[str], expected: str, cli: Cli) -> None:
    done = cli(*arguments)
    assert done.status == 2
    assert expected in done.err
    assert "Traceback" not in done.err
