"""generate, merge, eval, preview and --dry-run on tiny runs."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.run_directory import ADAPTER, CHECKPOINTS

Cli = Callable[..., Any]
MakeRecipe = Callable[..., str]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {word}"},
            {"role": "assistant", "content": f"{word} {word}"},
        ]
    }
    for word in ("the model", "a row", "tokens", "one step", "weights", "an answer")
]
LOUD = 'loggers=[{name = "terminal"}]'


def tree(directory: Path) -> dict[str, bytes]:
    """Every file's content, and every directory, by its path within."""
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b""
        for p in directory.rglob("*")
    }


@pytest.fixture
def run(make_recipe: MakeRecipe) -> Path:
    """A run whose adapter has moved far from its start."""
    reference = make_recipe(
        ROWS,
        optimizer={"lr": 3e-2},
        schedule={"name": "constant"},
        training={"epochs": 6, "batch_size": 3},
    )
    return lorakit.train(reference).output


def perplexity(cli: Cli, model: Path, data: Path) -> tuple[float, float, int, int]:
    """loss, perplexity, trained tokens and rows, as `lorakit eval` prints them."""
    done = cli("eval", model, "--data", data, "--device", "cpu")
    assert done.status == 0, done.err
    found = re.fullmatch(
        r"loss (\S+)  perplexity (\S+)  over ([\d,]+) tokens of ([\d,]+) rows\n", done.out
    )
    assert found, done.out
    return float(found[1]), float(found[2]), int(found[3].replace(",", "")), int(found[4])


def test_generate_answers_alike_from_run_adapter_checkpoint_and_merged(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    assert cli("merge", run, "--output", merged).status == 0
    last = max((run / CHECKPOINTS).iterdir())
    answers = set()
    for source in (run, run / ADAPTER, last, merged):
        done = cli("generate", source, "--prompt", "Say tokens", "--max-new-tokens", 12)
        assert done.status == 0, done.err
        answers.add(done.out)
    assert len(answers) == 1
    assert answers.pop().strip()


def test_generate_follows_its_flags(
    run: Path, cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("generate", run, "--prompt", "Say tokens", "--max-new-tokens", 6)
    greedy = cli(*ask)
    assert cli(*ask, "--seed", 5).out == greedy.out
    drawn = {cli(*ask, "--temperature", 2.0, "--seed", seed).out for seed in range(4)}
    assert len(drawn) > 1
    assert cli(*ask, "--temperature", 2.0, "--seed", 3).out in drawn
    monkeypatch.setattr("sys.stdin", io.StringIO("Say tokens"))
    assert cli("generate", run, "--prompt", "-", "--max-new-tokens", 6).out == greedy.out
    # As `echo` writes it.
    monkeypatch.setattr("sys.stdin", io.StringIO("Say tokens\n"))
    assert cli("generate", run, "--prompt", "-", "--max-new-tokens", 6).out == greedy.out
    # The base model alone answers something else: training did something.
    base = cli("generate", checkpoint, "--prompt", "Say tokens", "--max-new-tokens", 6)
    assert base.status == 0
    assert base.out != greedy.out


def test_eval_sees_what_training_did(run: Path, cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    data = run.parent / "data.jsonl"
    merged = tmp_path / "merged"
    cli("merge", run, "--output", merged)
    before = perplexity(cli, checkpoint, data)
    after = perplexity(cli, run, data)
    folded = perplexity(cli, merged, data)
    assert after[0] < 0.7 * before[0]
    assert folded[0] == pytest.approx(after[0], abs=2e-4)
    assert before[2:] == after[2:] == folded[2:]
    assert after[3] == len(ROWS)
    assert after[1] == pytest.approx(math.exp(after[0]), rel=1e-3)


def test_eval_as_json(run: Path, cli: Cli) -> None:
    data = run.parent / "data.jsonl"
    loss, score, tokens, rows = perplexity(cli, run, data)
    done = cli("eval", run, "--data", data, "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert found.pop("loss") == pytest.approx(loss, abs=6e-5)
    assert found.pop("perplexity") == pytest.approx(score, abs=6e-3)
    counts = {"trained_tokens": tokens, "rows": rows, "rows_cut": 0, "rows_left_out": 0}
    assert found == counts


def test_eval_as_json_tells_what_was_cut_and_left_out(make_recipe: MakeRecipe, cli: Cli) -> None:
    output = lorakit.train(make_recipe(ROWS, data={"max_seq_len": 40})).output
    user, assistant = ROWS[0]["messages"]
    long_answer = {"messages": [user, {**assistant, "content": "x " * 60}]}
    long_prompt = {"messages": [{**user, "content": "x " * 90}, assistant]}
    data = output.parent / "more.jsonl"
    rows = [*ROWS, long_answer, long_answer, long_prompt]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = cli("eval", output, "--data", data, "--json")
    found = json.loads(done.out)
    assert (found["rows"], found["rows_cut"], found["rows_left_out"]) == (len(ROWS) + 2, 2, 1)
    assert "data: 2 rows cut to 40 tokens" in done.err


def test_eval_as_json_of_a_broken_model(checkpoint: Path, cli: Cli, tmp_path: Path) -> None:
    """JSON has no nan."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    found = json.loads(
        cli("eval", broken, "--data", data, "--json").out, parse_constant=pytest.fail
    )
    assert (found["loss"], found["perplexity"], found["rows"]) == (None, None, 1)


def test_eval_of_one_row_is_the_loss_of_a_step(
    make_recipe: MakeRecipe, cli: Cli, checkpoint: Path
) -> None:
    """The first step's loss is the base model's: the adapter starts at nothing."""
    reference = make_recipe(ROWS, training={"batch_size": len(ROWS), "max_steps": 1})
    output = lorakit.train(reference).output
    (line,) = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    loss, _, tokens, _ = perplexity(cli, checkpoint, output.parent / "data.jsonl")
    assert loss == pytest.approx(json.loads(line)["loss"], abs=1e-4)
    assert tokens == json.loads(line)["trained_tokens"]


def test_merge_does_not_write_over_anything(run: Path, cli: Cli, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("x")
    before = tree(tmp_path)
    done = cli("merge", run, "--output", taken)
    assert done.status == 2
    assert f"{taken} exists and is not empty" in done.err
    assert tree(tmp_path) == before
    taken.joinpath("precious").unlink()
    assert cli("merge", run, "--output", taken).status == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(tree(taken))


def test_merge_keeps_the_bases_shards_and_dtype(
    make_recipe: MakeRecipe, make_checkpoint: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    base = make_checkpoint(max_shard_size="30KB")
    output = lorakit.train(make_recipe(ROWS, model=base)).output
    merged = tmp_path / "merged"
    assert cli("merge", output, "--output", merged).status == 0
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(p.name for p in merged.glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    weight_map = json.loads((base / index).read_text())["weight_map"]
    assert json.loads((merged / index).read_text())["weight_map"] == weight_map
    changed = set()
    for shard in shards:
        old, new = load_file(base / shard), load_file(merged / shard)
        assert {n: t.dtype for n, t in old.items()} == {n: t.dtype for n, t in new.items()}
        changed |= {name for name, tensor in old.items() if not tensor.equal(new[name])}
    assert changed == {name for name in weight_map if "proj" in name}


@pytest.mark.parametrize("command", ["generate", "eval", "merge"])
def test_what_is_no_run(command: str, cli: Cli, tmp_path: Path) -> None:
    more = {
        "generate": ("--prompt", "x"),
        "eval": ("--data", tmp_path / "x.jsonl"),
        "merge": ("--output", tmp_path / "out"),
    }[command]
    for what in (tmp_path, tmp_path / "absent"):
        done = cli(command, what, *more)
        assert done.status == 2
        assert done.err.startswith("error: ")
        assert str(what) in done.err
        assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_whose_base_is_gone(run: Path, cli: Cli) -> None:
    config = run / ADAPTER / "adapter_config.json"
    table = json.loads(config.read_text())
    config.write_text(json.dumps({**table, "base_model_name_or_path": "/gone/away"}))
    own = run / ADAPTER / "lorakit.json"
    own.write_text(json.dumps({"model": {"path": "/gone/too"}}))
    done = cli("generate", run, "--prompt", "x")
    assert done.status == 2
    assert "its base model /gone/away is not here" in done.err
    assert "base_model_name_or_path" in done.err


@pytest.mark.parametrize("damage", ["truncate", "no tensors", "no config", "junk config"])
def test_a_damaged_adapter(damage: str, run: Path, cli: Cli) -> None:
    tensors = run / ADAPTER / "adapter_model.safetensors"
    config = run / ADAPTER / "adapter_config.json"
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:200])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text("{")
    # As a directory of its own: a run would be read from its checkpoint.
    done = cli("generate", run / ADAPTER, "--prompt", "x")
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err


def test_preview_shows_what_is_trained(make_recipe: MakeRecipe, cli: Cli) -> None:
    reference = make_recipe(ROWS)
    before = tree(Path(reference.rpartition("/")[0]))
    done = cli("preview", reference, "--rows", 1)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("data: 6 rows, ")
    # Trained is the answer with the token that ends it, and nothing else.
    assert re.findall("«(.*?)»", done.out, re.DOTALL) == ["the model the model<|im_end|>"]
    assert "<|im_start|>user\nSay the model<|im_end|>" in done.out
    assert tree(Path(reference.rpartition("/")[0])) == before


def test_preview_tells_what_is_cut(make_recipe: MakeRecipe, cli: Cli) -> None:
    rows = [*ROWS, {"messages": [{"role": "user", "content": "x " * 90}, ROWS[0]["messages"][1]]}]
    done = cli("preview", make_recipe(rows, data={"max_seq_len": 40, "too_long": "drop"}))
    assert done.status == 0, done.err
    assert "1 rows over 40 tokens left out" in done.out.splitlines()[0]


@pytest.mark.parametrize("dora", [False, True])
def test_dry_run_writes_nothing(dora: bool, make_recipe: MakeRecipe, cli: Cli) -> None:
    reference = make_recipe(ROWS, adapter={"dora": dora})
    folder = Path(reference.rpartition("/")[0])
    before = tree(folder)
    done = cli("train", reference, "--dry-run", "--set", "adapter.rank=3")
    assert done.status == 0, done.err
    assert tree(folder) == before
    assert "rank = 3" in done.out
    assert "run: 6 steps of 1 x 1 rows" in done.out
    # What it says of the model is what training then says.
    (planned,) = re.findall(r"lora: training (.*) parameters", done.out)
    trained = cli("train", reference, "--set", "adapter.rank=3", "--set", LOUD)
    assert trained.status == 0, trained.err
    assert f"lora: training {planned} parameters" in trained.out


def test_dry_run_finds_what_training_would(make_recipe: MakeRecipe, cli: Cli) -> None:
    reference = make_recipe([{"messages": [{"role": "user", "content": "?"}]}])
    done = cli("train", reference, "--dry-run")
    assert done.status == 2
    assert "no token of this row is trained" in done.err
