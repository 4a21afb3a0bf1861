"""What merging a QLoRA adapter costs: into the original weights, into the dequantized base."""

from __future__ import annotations

import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit import block_streaming, merge_divergence
from lorakit.assemble import assemble
from lorakit.cli import main
from lorakit.data.batches import IGNORED
from lorakit.merge_divergence import mean_divergence, training_rows
from lorakit.mergeable import open_mergeable
from lorakit.progress import SilentProgress
from lorakit.recipes import resolve_recipe
from lorakit.trained import load_trained

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
SECTIONS = {
    "adapter": {"rank": 8},
    "training": {"batch_size": 3, "epochs": 2},
    "precision": {"name": "fp32"},
    "quantization": {"name": "nf4"},
}


@pytest.fixture
def make_run(make_recipe, make_checkpoint):
    def make_run(rows=None, *, model=None, **sections) -> Path:
        model = model or make_checkpoint(**WIDE)
        sections = {k: v for k, v in {**SECTIONS, **sections}.items() if v is not None}
        return lorakit.train(make_recipe(rows, model=model, **sections)).output

    return make_run


def opened(run: Path):
    return open_mergeable(str(run), SilentProgress())


def divergence(run: Path):
    found = opened(run)
    batch = training_rows(found, SilentProgress())
    return merge_divergence.merge_divergence(found, batch, CPU, SilentProgress()), batch


def merged(run: Path, base: str) -> Path:
    found, output = opened(run), run / base
    weight = found.dequantized_base(CPU) if base == "dequantized" else None
    found.merge(output, SilentProgress(), weight)
    return output


def transformers_logits(directory: Path, batch) -> torch.Tensor:
    """In fp64, document by document, where the next token is trained."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        documents = batch.tokens.split(batch.layout.lengths)
        whole = torch.cat([model(document[None]).logits[0] for document in documents])
    return whole[batch.labels != IGNORED]


def trained_in_memory(run: Path, batch) -> torch.Tensor:
    """The whole trained model's logits, as `lorakit generate` loads it."""
    model = load_trained(str(run), "cpu").model
    with torch.no_grad():
        hidden = model.hidden(batch.tokens, batch.layout)[batch.labels != IGNORED]
        return model.logits(hidden).double()


def brute_force(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.softmax(-1), q.softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_it_is_that_of_whole_models_in_fp64(scheme, dora, make_run):
    adapter = {"rank": 8, "dora": dora, "dropout": 0.1}
    run = make_run(quantization={"name": scheme}, adapter=adapter)
    found, batch = divergence(run)
    trained = trained_in_memory(run, batch)
    for base in ("original", "dequantized"):
        expected = brute_force(trained, transformers_logits(merged(run, base), batch))
        assert getattr(found, base) == pytest.approx(expected, rel=1e-2, abs=1e-9), base
    assert found.tokens == batch.trained == int((batch.labels != IGNORED).sum())
    assert found.rows == len(batch.rows) == 8


def test_a_dequantized_base_stored_in_fp32_holds_what_was_trained(make_run):
    found, _ = divergence(make_run())
    assert abs(found.dequantized) < 1e-9
    assert found.original > 1e-5


@pytest.fixture
def in_bf16(make_checkpoint, tmp_path):
    """An untied checkpoint in bf16, in shards that cut blocks in two."""
    base = tmp_path / "base"
    shutil.copytree(
        make_checkpoint(**WIDE, tie_word_embeddings=False, max_shard_size="100KB"), base
    )
    files = list(base.glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        tensors = {name: t.bfloat16() for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_shards_bf16_and_an_adapter_on_the_head(precision, make_run, in_bf16):
    targets = ["q_proj", "down_proj", "lm_head"]
    adapter = {"rank": 8, "targets": targets}
    run = make_run(model=in_bf16, adapter=adapter, precision={"name": precision})
    found, batch = divergence(run)
    trained = trained_in_memory(run, batch)
    for base in ("original", "dequantized"):
        expected = brute_force(trained, transformers_logits(merged(run, base), batch))
        assert getattr(found, base) == pytest.approx(expected, rel=2e-2), base


def test_the_dequantized_base_is_bitsandbytes_own(make_run, in_bf16):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    run = make_run(model=in_bf16, adapter={"rank": 8, "targets": ["q_proj"]})
    stored = {n: t for f in in_bf16.glob("*.safetensors") for n, t in load_file(f).items()}
    there = merged(run, "dequantized")
    found = {n: t for f in there.glob("*.safetensors") for n, t in load_file(f).items()}
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert found.keys() == stored.keys()
    for name, weight in stored.items():
        if "_proj" not in name:
            assert found[name].equal(weight), name
            continue
        packed, state = quantize_4bit(
            weight.float(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        expected = dequantize_4bit(packed, state)
        if "q_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (adapter[f"{key}.lora_{x}.weight"] for x in "AB")
            # alpha 8 over rank 8.
            expected = expected + b @ a
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name], expected.bfloat16(), atol=0, rtol=2**-7)
        assert not found[name].equal(weight)


def test_the_merge_at_the_end_of_a_run_is_into_the_original_weights(make_run):
    run = make_run(checkpointer={"save_merged": True})
    found = load_file(run / "merged" / "model.safetensors")
    for name, expected in load_file(merged(run, "original") / "model.safetensors").items():
        assert found[name].equal(expected)


@pytest.mark.parametrize("part", ["", "adapter", "checkpoints"])
def test_a_run_its_adapter_and_its_checkpoint_say_the_same(part, make_run):
    run = make_run()
    path = max((run / part).iterdir()) if part == "checkpoints" else run / part
    assert divergence(path)[0] == divergence(run)[0]


def test_at_most_one_block_is_in_memory(make_run, monkeypatch):
    """Of the weights; what is outside the blocks stays."""
    run = make_run()
    load, alive = block_streaming._load, []

    def watched(module, part, loading):
        if part.prefix:
            assert not [name for name, block in alive if block() is not None]
            alive.append((part.prefix, weakref.ref(module)))
        return load(module, part, loading)

    monkeypatch.setattr(block_streaming, "_load", watched)
    divergence(run)
    assert len(alive) == 3 * WIDE["num_hidden_layers"]
    assert len({name for name, _ in alive}) == WIDE["num_hidden_layers"]


def test_rows_end_with_their_32nd_trained_token_and_the_longest_go_first(make_run):
    words = "the model learns a small update beside every frozen weight "

    def row(prompt, answer):
        turns = [("user", words * prompt), ("assistant", words * answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    rows = [row(1, 1), row(1, 4), row(9, 1), row(10, 1), row(11, 1), *[row(1, 1)] * 20]
    run = make_run(rows, data={"max_seq_len": 256}, training={"max_steps": 1})
    batch = training_rows(opened(run), SilentProgress())
    labels = batch.labels.split(batch.layout.lengths)
    counts = [int((part != IGNORED).sum()) for part in labels]
    assert max(counts) == counts[1] == 32
    assert labels[1][-2] != IGNORED
    assert sum(batch.layout.lengths) <= 512
    assert 2 < len(batch.rows) < 8
    # Each is the start of the row as it was trained.
    whole = [e.ids for e in resolved_dataset(run).examples]
    for document in batch.tokens.split(batch.layout.lengths):
        assert any(ids[: len(document)].tolist() == document.tolist() for ids in whole)


def resolved_dataset(run: Path):
    recipe = resolve_recipe(f"{run / 'recipe.toml'}:tiny")
    return assemble(recipe, SilentProgress(), weights=False).dataset


@given(st.integers(1, 40), st.integers(2, 50), st.floats(0, 30), st.integers(0, 2**31))
def test_the_mean_is_torchs_own_divergence(tokens, vocabulary, size, seed):
    chance = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(tokens, vocabulary, generator=chance) * size for _ in range(2))
    ours = mean_divergence(p, q)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()),
        torch.distributions.Categorical(logits=q.double()),
    )
    assert ours == pytest.approx(float(theirs.mean()), rel=1e-9, abs=1e-12)
    assert mean_divergence(p, p) == 0


# ---------------------------------------------------------------- the command


def call(capsys, *arguments) -> tuple[object, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    return exited.value.code, written.out, " ".join(written.err.split())


SAID = (
    r"mean KL divergence from the trained model over (\d+) tokens of 8 rows: into the original "
    r"weights (\S+) nats, into the dequantized base (\S+) nats\n"
)


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_merge_prints_what_both_cost(base, make_run, tmp_path, capsys):
    run = make_run()
    output = tmp_path / "out"
    status, out, err = call(capsys, "merge", run, "--output", output, "--base", base)
    assert status == 0, err
    number, original, dequantized = re.search(SAID, out).groups()
    found, batch = divergence(run)
    assert int(number) == batch.trained
    assert float(original) == pytest.approx(found.original, rel=0.06)
    assert float(dequantized) == pytest.approx(found.dequantized, rel=0.06, abs=1e-9)
    written = load_file(output / "model.safetensors")
    for name, expected in load_file(merged(run, base) / "model.safetensors").items():
        assert written[name].equal(expected)


def test_merge_says_nothing_of_it_where_it_is_not_asked_for(make_run, tmp_path, capsys):
    run = make_run()
    status, out, _ = call(capsys, "merge", run, "--output", tmp_path / "a", "--no-divergence")
    assert status == 0
    assert "divergence" not in out
    plain = make_run(quantization=None)
    status, out, _ = call(capsys, "merge", plain, "--output", tmp_path / "b")
    assert status == 0
    assert "divergence" not in out


def test_there_is_no_dequantized_base_of_one_that_was_not_quantized(make_run, tmp_path, capsys):
    run = make_run(quantization=None)
    output = tmp_path / "out"
    status, _, err = call(capsys, "merge", run, "--output", output, "--base", "dequantized")
    assert status == 2
    assert "--base dequantized:" in err
    assert "was not trained over a quantized base" in err
    assert not output.exists()


@pytest.mark.parametrize("damage", ["apart", "data", "recipe", "scheme"])
def test_what_stands_in_the_way_is_told_and_the_merge_is_done(damage, make_run, tmp_path, capsys):
    run, path = make_run(), None
    if damage == "apart":
        path = shutil.copytree(run / "adapter", tmp_path / "elsewhere")
        expected = "is apart from its run, whose recipe.toml says which data it was trained on"
    elif damage == "data":
        (run.parent / "data.jsonl").unlink()
        expected = "data.jsonl"
    elif damage == "recipe":
        (run / "recipe.toml").write_text("[")
        expected = "no recipe in TOML"
    else:
        own = run / "adapter" / "lorakit.json"
        own.write_text(own.read_text().replace('"nf4"', '"nf3"'))
        expected = "no quantization is called 'nf3'"
    status, out, err = call(capsys, "merge", path or run, "--output", tmp_path / "out")
    assert status == 0, err
    (line,) = [line for line in out.splitlines() if "divergence" in line]
    assert line.startswith("mean KL divergence from the trained model: not known, as ")
    assert expected in line
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_adapter_apart_from_its_run_can_be_merged_into_the_dequantized_base(make_run, tmp_path):
    run = make_run()
    apart = shutil.copytree(run / "adapter", tmp_path / "elsewhere")
    ours = load_file(merged(apart, "dequantized") / "model.safetensors")
    for name, tensor in load_file(merged(run, "dequantized") / "model.safetensors").items():
        assert ours[name].equal(tensor)


def test_the_scheme_is_needed_for_the_dequantized_base(make_run, tmp_path, capsys):
    run = make_run()
    own = run / "adapter" / "lorakit.json"
    own.write_text(own.read_text().replace('"nf4"', '"nf3"'))
    output = tmp_path / "out"
    status, _, err = call(capsys, "merge", run, "--output", output, "--base", "dequantized")
    assert status == 2
    assert "no quantization is called 'nf3'" in err
    assert not output.exists()
