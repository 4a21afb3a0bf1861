"""Ranks and alphas of single layers: which layer gets which, told by PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorakit.builtin import lora
from lorakit.builtin.lora import LoRAOptions
from lorakit.cli import main
from lorakit.errors import UserError
from lorakit.structuring import structure

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.up_proj", "mlp.down_proj")
]
KEYS = st.sampled_from(
    [
        *("q_proj", "up_proj", "proj", "self_attn.q_proj", "1.mlp.up_proj", "layers.1.mlp"),
        *(".*q_proj", ".*", r"layers\.1\.mlp\..*", "(q|up)_proj", "q_proj|up_proj", "model"),
        *(r"model\.layers\.0\.self_attn\.q_proj", "model.layers.1.mlp.up_proj", r"\w+_proj", ""),
    ]
)


def of_peft(pattern, name, default):
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


@settings(max_examples=150)
@given(st.dictionaries(KEYS, st.integers(1, 9), max_size=4), st.booleans())
def test_each_layer_gets_what_peft_gives_it(pattern, rslora):
    alphas = {key: value + 0.5 for key, value in pattern.items()}
    options = LoRAOptions(rank=64, alpha=3.0, rslora=rslora, rank_pattern=pattern,
                          alpha_pattern=alphas)  # fmt: skip
    for name in NAMES:
        rank = of_peft(pattern, name, 64)
        assert options.rank_at(name) == rank
        alpha = of_peft(alphas, name, 3.0)
        assert options.scale_at(name) == pytest.approx(alpha / (rank**0.5 if rslora else rank))


@settings(max_examples=150)
@given(st.dictionaries(KEYS, st.integers(1, 9), max_size=4))
def test_what_is_written_means_the_same_with_its_keys_sorted(pattern):
    """PEFT sorts them, and so do lorakit's checkpoints."""
    options = LoRAOptions(rank=64, rank_pattern=pattern, alpha_pattern=pattern)
    text = json.dumps(lora.to_config(options, NAMES), sort_keys=True)
    config = json.loads(text)
    again = lora.from_config(config)
    for name in NAMES:
        assert of_peft(config["rank_pattern"], name, 64) == options.rank_at(name)
        assert again.rank_at(name) == options.rank_at(name)
        assert again.scale_at(name) == options.scale_at(name)


def test_patterns_that_do_not_overlap_are_written_as_they_are():
    pattern = {"q_proj": 2, r"layers\.1\.mlp\..*": 4}
    options = LoRAOptions(rank_pattern=pattern, alpha_pattern={"up_proj": 3.0, "q_proj": 2.5})
    config = lora.to_config(options, NAMES)
    assert config["rank_pattern"] == pattern
    assert repr(config["alpha_pattern"]) == "{'up_proj': 3, 'q_proj': 2.5}"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("q_porj", ["no adapted layer matches 'q_porj' (did you mean 'q_proj'?)", "down_proj"]),
        ("layers.1.mlp", [r"write 'layers\.1\.mlp\..*'", "model.layers.1.mlp.up_proj is in it"]),
        ("k_proj", ["no adapted layer matches 'k_proj'"]),
        ("(q", ["not a valid regex: '(q'"]),
    ],
)
@pytest.mark.parametrize("where", ["rank_pattern", "alpha_pattern"])
def test_key_that_matches_no_adapted_layer(where, key, said):
    options = LoRAOptions(**{where: {"up_proj": 2, key: 4}})
    with pytest.raises(UserError) as caught:
        lora.targets(options, [*NAMES, "lm_head"])
    for text in [f"adapter.{where}: ", *said]:
        assert text in str(caught.value)


def test_key_of_a_layer_that_is_not_adapted():
    options = LoRAOptions(targets=("q_proj",), rank_pattern={"up_proj": 4})
    with pytest.raises(UserError, match="no adapted layer matches 'up_proj'"):
        lora.targets(options, [*NAMES, "lm_head"])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"q_proj": 0}, "adapter.rank_pattern: must be >= 1: 0"),
        ({"q_proj": "8"}, 'adapter.rank_pattern.q_proj: expected a whole number, got "8"'),
        ({"q_proj": True}, "adapter.rank_pattern.q_proj: expected a whole number, got true"),
        ({"q_proj": 2.0}, "adapter.rank_pattern.q_proj: expected a whole number, got 2.0"),
        (8, "adapter.rank_pattern: expected a table of whole numbers, got 8"),
    ],
)
def test_value_that_is_no_rank(value, said):
    options, problems = structure(LoRAOptions, {"rank_pattern": value}, "adapter")
    assert options is None
    assert problems == [said]


def test_all_wrong_values_are_told_at_once():
    _, problems = structure(LoRAOptions, {"rank_pattern": {"a": "x", "b": 1, "c": []}}, "adapter")
    assert [p.split(":")[0] for p in problems] == ["adapter.rank_pattern.a",
                                                   "adapter.rank_pattern.c"]  # fmt: skip


def test_recipe_and_run_keep_it(train_run, make_recipe, capsys):
    """From the recipe's table, and over --set, to the adapter's file and back on resuming."""
    pattern = {"q_proj": 3, r"model\.layers\.1\.mlp\..*": 2}
    reference = make_recipe(adapter={"rank": 5, "rank_pattern": pattern})
    with pytest.raises(SystemExit) as exited:
        main(["train", reference, "--set", "adapter.alpha_pattern.up_proj=4"])
    assert exited.value.code == 0
    run = reference.rpartition("/")[0] + "/run"
    config = json.loads(Path(run, "adapter", "adapter_config.json").read_text())
    assert config["rank_pattern"] == pattern
    assert config["alpha_pattern"] == {"up_proj": 4}
    with pytest.raises(SystemExit) as exited:
        main(["train", f"{run}/recipe.toml:tiny", "--resume", "--output", run])
    assert exited.value.code == 0, capsys.readouterr().err
