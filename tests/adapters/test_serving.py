"""Whether vLLM serves an adapter as it is: the rule, and where the user is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorakit.builtin.lora import LoRAOptions
from lorakit.builtin.lora_serving import serving
from lorakit.catalog import load_catalog
from lorakit.cli import main
from lorakit.protocols import Serving
from lorakit.records import ModelFamily
from lorakit.serving import serving_advice
from lorakit.weights.base import family_of

LLAMA = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
PHI3 = ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"]


@pytest.mark.parametrize("names", [LLAMA, PHI3])
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"rank": 8}, ()),
        ({"rank": 16, "rslora": True, "dropout": 0.1}, ()),
        ({"rank": 17}, ("--max-lora-rank", "32")),
        ({"rank": 64}, ("--max-lora-rank", "64")),
        ({"rank": 300}, ("--max-lora-rank", "320")),
        # All layers get what they would get without it.
        ({"rank": 8, "rank_pattern": {".*_proj": 8}}, ()),
    ],
)
def test_adapters_it_serves(options, flags, names):
    assert serving(LoRAOptions(**options), names) == Serving(flags=flags)


@pytest.mark.parametrize(
    ("options", "names", "said"),
    [
        ({"dora": True}, LLAMA, ["DoRA"]),
        ({"rank_pattern": {"q_proj": 4}}, LLAMA, ["rank_pattern"]),
        ({"rank_pattern": {".*": 4}}, LLAMA, ["rank_pattern"]),
        ({"alpha_pattern": {".*": 4.0}}, LLAMA, ["alpha_pattern"]),
        # One scale for all, but at ranks it does not read.
        ({"rank": 8, "alpha": 8, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4.0}},
         LLAMA, ["one rank"]),
        ({}, [*LLAMA, "lm_head"], ["output head"]),
        ({"rank": 513}, LLAMA, ["512"]),
        ({"dora": True, "rank": 600}, PHI3, ["DoRA", "512"]),
    ],
)  # fmt: skip
def test_adapters_it_refuses(options, names, said):
    found = serving(LoRAOptions(**options), names)
    assert found.flags == ()
    assert len(found.refused) == len(said)
    for reason, word in zip(found.refused, said, strict=True):
        assert word in reason


@pytest.fixture
def advice(tmp_path):
    """`advice(family, config)`: what is said of an adapter that vLLM takes."""
    (tmp_path / "config.json").write_text("{}")
    method = next(m for m in load_catalog().all("adapter") if m.name == "lora")

    def advice(family, config):
        base = SimpleNamespace(path=tmp_path, config=config)
        adapter = tmp_path / "run" / "adapter"
        return serving_advice(method, LoRAOptions(), LLAMA, family=family, base=base,
                              base_name="base", adapter=adapter)  # fmt: skip

    return advice


CONFIGS = sorted((Path(__file__).parents[1] / "models" / "configs").glob("*.json"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_lorakits_own_families_say_which_models_vllm_serves(file, advice):
    config = json.loads(file.read_text())
    family = family_of(config, load_catalog(), file)
    assert set(config["architectures"]) <= set(family.vllm_architectures)
    assert advice(family, config).startswith("vllm serve base --enable-lora --lora-modules run=")


@pytest.mark.parametrize(
    ("known", "config", "said"),
    [
        ((), {"architectures": ["ToyForCausalLM"]}, "whether vLLM serves toy models is not known"),
        (("ToyForCausalLM",), {"architectures": ["ToyModel"]}, "whether vLLM serves ToyModel is"),
        (("ToyForCausalLM",), {"architectures": "ToyForCausalLM"}, "has no `architectures`"),
        (("ToyForCausalLM",), {}, "has no `architectures`"),
    ],
)
def test_of_a_model_it_may_not_have_no_command_is_given(known, config, said, advice):
    family = ModelFamily(
        name="toy", summary="x", model_types=("toy",), build=None, vllm_architectures=known
    )
    assert said in advice(family, config)
    assert "vllm serve" not in advice(family, config)


def test_a_record_of_before_says_nothing_and_gets_no_command(advice):
    family = ModelFamily(name="toy", summary="x", model_types=("toy",), build=None)
    assert advice(family, {"architectures": ["LlamaForCausalLM"]}) == (
        "whether vLLM serves toy models is not known to lorakit"
    )


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as exited:
            main([str(a) for a in arguments])
        assert exited.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"rank": 20}, "vllm serve {base} --enable-lora --max-lora-rank 32 --lora-modules run="),
        ({"dora": True}, "not as it is, since it refuses DoRA. Serve the merged model instead\n"),
    ],
)
def test_training_and_merging_say_it(adapter, said, cli, make_recipe, checkpoint, tmp_path):
    reference = make_recipe(adapter=adapter, loggers=[{"name": "terminal"}])
    run = reference.rpartition("/")[0] + "/run"
    said = "serve with vLLM: " + said.format(base=checkpoint)
    assert said in cli("train", reference)
    assert said in cli("merge", run, "--check", "--output", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert said in cli("merge", run, "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_merge_without_an_output_is_an_error(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["merge", "somewhere"])
    assert exited.value.code == 2
    assert "--output" in capsys.readouterr().err
