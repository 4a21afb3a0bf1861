"""`lorakit estimate`, and the refusal of runs that cannot fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import lorakit
from lorakit.cli import app, main
from lorakit.estimate import check
from lorakit.estimate.room import Room

MB = 2**20


def estimate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["estimate", *arguments], catch_exceptions=False)


def test_it_shows_the_parts_their_sum_and_what_would_fit(make_recipe: Callable[..., str]):
    found = estimate(make_recipe())
    assert found.exit_code == 0
    for word in ("base weights", "embeddings and head", "adapter", "optimizer", "process"):
        assert word in found.output
    assert "it fits: available are" in found.output
    assert "largest batch_size" in found.output
    assert "longest rows" in found.output


def test_its_numbers_add_up(make_recipe: Callable[..., str]):
    found = json.loads(estimate(make_recipe(), "--json").stdout)
    assert sum(found["parts"].values()) == found["total"] < found["available"]
    assert found["fits"] is True


def test_it_takes_the_largest_micro_batch_of_the_data(
    make_recipe: Callable[..., str], make_rows: Callable[..., Any]
):
    from lorakit.assemble import assemble
    from lorakit.progress import SilentProgress
    from lorakit.recipes import resolve_recipe

    reference = make_recipe(make_rows(20), training={"batch_size": 3})
    plan = assemble(resolve_recipe(reference), SilentProgress()).plan
    most = max(sum(len(plan.dataset.examples[i]) for i in rows) for rows in plan.micro_batches(0))
    assert json.loads(estimate(reference, "--json").stdout)["tokens"] == most
    worst = json.loads(estimate(reference, "--json", "--without-data").stdout)
    assert worst["tokens"] == 3 * 128
    assert worst["documents"] == 3


def test_compare_has_every_quantization_with_every_mode_of_checkpointing(
    make_recipe: Callable[..., str], make_checkpoint: Callable[..., Path]
):
    # Wide enough for a quantized layer's lookup table not to matter.
    reference = make_recipe(model=make_checkpoint(hidden_size=256, intermediate_size=256))
    found = json.loads(estimate(reference, "--json", "--compare").stdout)["compare"]
    assert [(r["quantization"], r["activation_checkpointing"]) for r in found] == [
        (name, mode) for name in ("none", "int8", "nf4") for mode in ("none", "selective", "block")
    ]
    weights = {(r["quantization"], r["activation_checkpointing"]): r["parts"] for r in found}
    assert (
        weights["nf4", "block"]["base weights"]
        < weights["int8", "block"]["base weights"]
        < weights["none", "block"]["base weights"]
    )
    text = estimate(reference, "--compare").output
    assert "quantization  checkpointing" in text


@pytest.mark.parametrize("quantization", [None, {"name": "nf4"}])
@pytest.mark.parametrize("mode", ["none", "block"])
def test_the_recipes_own_row_of_the_comparison_has_the_figures_of_the_table(
    mode: str, quantization: dict[str, Any] | None, make_recipe: Callable[..., str]
):
    sections = {"quantization": quantization} if quantization else {}
    reference = make_recipe(training={"activation_checkpointing": mode}, **sections)
    lines = estimate(reference, "--compare").output.splitlines()
    above = dict(re.findall(r"^  (\S.*?)  +(\S+ \S+)$", "\n".join(lines), re.MULTILINE))
    header = next(i for i, line in enumerate(lines) if line.startswith("quantization"))
    (own,) = [line for line in lines[header:] if line.endswith("yes, this recipe")]
    names, figures = (re.split(r" {2,}", line) for line in (lines[header], own))
    row = dict(zip(names, figures, strict=True))
    assert (row["quantization"], row["checkpointing"]) == (
        quantization["name"] if quantization else "none",
        mode,
    )
    for part in ("base weights", "activations", "allocator", "in all"):
        assert row[part] == above.get(part, "0 B"), part

    content = json.loads(estimate(reference, "--compare", "--json").stdout)
    (own_parts,) = [
        variant["parts"]
        for variant in content["compare"]
        if (variant["quantization"], variant["activation_checkpointing"])
        == (row["quantization"], mode)
    ]
    assert own_parts == content["parts"]
    named = sum(own_parts[part] for part in ("base weights", "activations", "allocator"))
    assert named < content["total"] == sum(own_parts.values())


def test_rows_of_one_quantization_count_the_process_once(make_recipe: Callable[..., str]):
    rows = json.loads(estimate(make_recipe(), "--compare", "--json").stdout)["compare"]
    for name in ("none", "int8", "nf4"):
        measured = {r["parts"]["process"] for r in rows if r["quantization"] == name}
        assert len(measured) == 1


def test_config_json_is_enough(make_recipe: Callable[..., str], checkpoint: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    whole = json.loads(estimate(make_recipe(), "--json", "--without-data").stdout)
    found = json.loads(estimate(make_recipe(model=bare), "--json").stdout)
    for part in ("base weights", "embeddings and head", "adapter", "optimizer"):
        assert found["parts"][part] == whole["parts"][part]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_device_that_is_not_there(
    make_recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for device in ("cuda", "cuda:3", "mps"):
        error = refused(["estimate", make_recipe(device=device)], capsys)
        assert f"this machine has no {device}" in error
    assert "device" in refused(["estimate", make_recipe(device="tpu")], capsys)


def test_a_model_that_is_nowhere(
    make_recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    error = refused(["estimate", make_recipe(model=tmp_path / "none")], capsys)
    assert "model.path" in error
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refused(["estimate", make_recipe(model=empty)], capsys)
    (empty / "config.json").write_text("{")
    assert "config.json: not readable" in refused(["estimate", make_recipe(model=empty)], capsys)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "room_on", lambda device: Room(100 * MB, 200 * MB, "machine"))


@pytest.mark.usefixtures("little_memory")
def test_a_run_that_cannot_fit_is_refused_with_the_table(
    make_recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
):
    reference = make_recipe()
    error = refused(["train", reference], capsys)
    assert "cannot fit in memory" in error
    assert "base weights" in error
    assert "100.00 MiB of 200.00 MiB" in error
    assert "--no-memory-check" in error
    assert not (Path(reference.partition(":")[0]).parent / "run").exists()


@pytest.mark.usefixtures("little_memory")
def test_unless_told_otherwise(make_recipe: Callable[..., str]):
    reference = make_recipe(training={"max_steps": 1})
    assert lorakit.train(reference, check_memory=False).steps == 1


def test_a_run_that_fits_many_times_over_is_not_rehearsed(
    make_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(check, "report_on", None)
    assert lorakit.train(make_recipe(training={"max_steps": 1})).steps == 1


CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.mark.slow
def test_it_is_within_a_tenth_of_what_a_run_takes(make_recipe: Callable[..., str], tmp_path: Path):
    """tests/bench/estimate_accuracy.py does this for real shapes."""
    write = "import sys, json; from lorakit.testing import write_checkpoint as write; "
    write += "write('llama', json.loads(sys.argv[1]), sys.argv[2])"
    run(["-c", write, json.dumps(CONFIG), str(tmp_path / "model")])
    reference = make_recipe(
        # Two that begin differently: each is computed by itself.
        [{"text": "abcdefgh" * 60}, {"text": "hgfedcba" * 60}],
        model=tmp_path / "model",
        data={"name": "text", "max_seq_len": 384},
        training={"batch_size": 2, "max_steps": 2, "epochs": 2, "activation_checkpointing": True},
        quantization={"name": "nf4"},
    )
    estimated = json.loads(run(["-m", "lorakit", "estimate", reference, "--json"])[0])["total"]
    measured = run(["-m", "lorakit", "train", reference])[1]
    assert estimated == pytest.approx(measured, rel=0.1)


def run(arguments: list[str]) -> tuple[str, int]:
    """What a process printed, and the most bytes it had resident.

    It is started by a small one: a process' largest resident size counts its parent's.
    """
    launcher = (
        "import json, resource, subprocess, sys; "
        "done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE, text=True);"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024; "
        "print(json.dumps([done.returncode, done.stdout, peak]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", launcher, *arguments],
        env={**os.environ, "LORAKIT_TUNE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    status, printed, peak = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    return printed, peak
