"""What an optimizer step comes to does not depend on how it is cut into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXED_ORDER = {"data": {"shuffle": False}}
KEYS = {
    "step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_second",
    "trained_tokens_per_second",
    "step_seconds", "peak_memory_bytes",
}  # fmt: skip


def adapter_of(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_equal_adapters(found, expected):
    found, expected = adapter_of(found), adapter_of(expected)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=0, msg=key)


def cut(batch_size, accumulation, **more):
    return {
        "training": {
            "batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": 0.0,
            **more,
        },
        # Not Adam, which makes of a gradient near 0 a step of its sign, rounding errors and all.
        "optimizer": {"name": "sgd", "lr": 0.5},
        **FIXED_ORDER,
    }


def uneven_rows(make_rows, count):
    """Rows that alternate between one exchange of a word and up to fourteen words a turn."""
    short, long = make_rows(count, longest=1), make_rows(count, seed=5)
    return [(short if i % 2 else long)[i] for i in range(count)]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulated_step_equals_the_whole_batch(
    batch_size, accumulation, train_run, make_rows, read_metrics
):
    rows = uneven_rows(make_rows, 16)
    whole = train_run(rows, **cut(8, 1))
    split = train_run(rows, **cut(batch_size, accumulation))
    assert_equal_adapters(split, whole)
    for ours, theirs in zip(read_metrics(split), read_metrics(whole), strict=True):
        for key in ("step", "epoch", "lr", "tokens", "trained_tokens"):
            assert ours[key] == theirs[key]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 9), (9, 1), (4, 3)])
def test_ragged_last_window_is_a_step_like_any_other(
    batch_size, accumulation, train_run, make_rows, read_metrics
):
    # 13 rows: windows of 9 and 4 rows, of 3 x 3 and 3 + 1 rows in the first run.
    rows = uneven_rows(make_rows, 13)
    size = 12 if batch_size == 4 else 9
    reference = (3, 4) if size == 12 else (3, 3)
    first = train_run(rows, **cut(*reference))
    second = train_run(rows, **cut(batch_size, accumulation))
    assert_equal_adapters(second, first)
    losses = [[m["loss"] for m in read_metrics(run)] for run in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 2


@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulation", "epochs", "steps"),
    [(7, 2, 2, 1, 2), (7, 2, 3, 2, 4), (8, 2, 2, 2, 4), (1, 4, 4, 3, 3), (9, 1, 4, 1, 3)],
)
def test_number_of_steps_counts_the_ragged_window(
    rows, batch_size, accumulation, epochs, steps, train_run, make_rows, read_metrics
):
    run = train_run(make_rows(rows), **cut(batch_size, accumulation, epochs=epochs))
    metrics = read_metrics(run)
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    assert metrics[-1]["epoch"] == epochs


def test_max_steps_ends_the_run_within_an_epoch(train_run, make_rows, read_metrics):
    run = train_run(make_rows(12), **cut(2, 1, epochs=3, max_steps=8))
    assert [m["step"] for m in read_metrics(run)] == list(range(1, 9))
    assert (run / "checkpoints" / "step-00000008").is_dir()


def test_every_step_has_a_learning_rate_above_zero(train_run, make_rows, read_metrics):
    run = train_run(
        make_rows(10),
        schedule={"name": "linear", "warmup_steps": 4},
        optimizer={"lr": 0.01},
    )
    rates = [m["lr"] for m in read_metrics(run)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:] == pytest.approx([0.01 * (6 - i) / 6 for i in range(6)])
    assert min(rates) > 0


def test_packing_changes_neither_loss_nor_adapter(train_run, make_rows, read_metrics):
    # One window holds all rows, whichever way they are laid out.
    rows = uneven_rows(make_rows, 10)
    plain = train_run(rows, **cut(1, 10, epochs=3))
    packed = train_run(rows, **{**cut(1, 10, epochs=3), "data": {"shuffle": False, "packed": True}})
    assert_equal_adapters(packed, plain)
    for ours, theirs in zip(read_metrics(packed), read_metrics(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["trained_tokens"] == theirs["trained_tokens"]
        assert ours["tokens"] == theirs["tokens"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_adapter(dropout, train_run, make_rows):
    rows = make_rows(8)
    adapter = {"adapter": {"dropout": dropout}}
    plain = train_run(rows, **cut(2, 2), **adapter)
    checkpointed = train_run(rows, **cut(2, 2, activation_checkpointing=True), **adapter)
    assert_equal_adapters(checkpointed, plain)


def test_same_recipe_gives_the_same_adapter_and_another_seed_another(train_run, make_rows):
    rows = make_rows(8)
    first, again, other = (train_run(rows, seed=seed) for seed in (3, 3, 4))
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(adapter_of(first)[key], adapter_of(again)[key])
    assert not torch.equal(adapter_of(first)[key], adapter_of(other)[key])


def reference_nll(checkpoint, rows):
    """Sum of the NLL over assistant tokens and their number, in float64, by transformers: its
    model, and its tokenizer's own rendering of the chat template."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    total, trained, tokens = 0.0, 0, 0
    for row in rows:
        ids, labels = [], []
        for turn in row["messages"]:
            head = tokenizer.encode(f"<|im_start|>{turn['role']}\n", add_special_tokens=False)
            body = tokenizer.encode(turn["content"] + "<|im_end|>", add_special_tokens=False)
            tail = tokenizer.encode("\n", add_special_tokens=False)
            ids += head + body + tail
            said = body if turn["role"] == "assistant" else [-100] * len(body)
            labels += [-100] * len(head) + said + [-100] * len(tail)
        rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert ids == tokenizer.encode(rendered, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        total += torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(labels[1:]), reduction="sum"
        ).item()
        trained += sum(label != -100 for label in labels)
        tokens += len(ids)
    return total, trained, tokens


def test_first_step_s_numbers_are_those_of_an_independent_forward(
    checkpoint, train_run, make_rows, read_metrics
):
    rows = uneven_rows(make_rows, 6)
    run = train_run(rows, **cut(2, 2))
    first, last = read_metrics(run)
    total, trained, tokens = reference_nll(checkpoint, rows[:4])
    assert first["loss"] == pytest.approx(total / trained, rel=1e-6)
    assert (first["trained_tokens"], first["tokens"]) == (trained, tokens)
    _, trained, tokens = reference_nll(checkpoint, rows[4:])
    assert (last["trained_tokens"], last["tokens"]) == (trained, tokens)


def test_metrics_have_all_keys_of_the_contract(train_run, read_metrics):
    metrics = read_metrics(train_run(training={"batch_size": 4, "epochs": 2}))
    assert len(metrics) == 6
    for line in metrics:
        assert line.keys() >= KEYS
        assert all(math.isfinite(line[key]) for key in KEYS)
        assert line["tokens"] / line["step_seconds"] == pytest.approx(line["tokens_per_second"])
        assert line["peak_memory_bytes"] > 0
    assert [line["epoch"] for line in metrics] == [1, 1, 1, 2, 2, 2]


def test_gradients_are_clipped_to_the_norm_and_logged_before(train_run, make_rows, read_metrics):
    rows = make_rows(4)
    settings = {k: v for k, v in cut(4, 1).items() if k != "training"}
    free = train_run(rows, **settings, training={"batch_size": 4, "max_grad_norm": 0.0})
    norm = read_metrics(free)[0]["grad_norm"]
    clipped = train_run(rows, **settings, training={"batch_size": 4, "max_grad_norm": norm / 4})
    assert read_metrics(clipped)[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    # A does not move in the first step, for B is zero; B's step shrinks with the gradient.
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    torch.testing.assert_close(
        adapter_of(clipped)[key] * 4, adapter_of(free)[key], atol=0, rtol=1e-4
    )


def test_training_lowers_the_loss(train_run, make_rows, read_metrics):
    run = train_run(make_rows(4), training={"batch_size": 4, "epochs": 25})
    losses = [m["loss"] for m in read_metrics(run)]
    assert losses[-1] < 0.7 * losses[0]


def test_lorakit_train_stays_a_function_once_its_submodule_is_imported(make_recipe):
    import lorakit
    from lorakit.loop import Result

    for _ in range(2):
        assert isinstance(lorakit.train(make_recipe()), Result)
