"""Every installed plugin of this repository, and every sample plugin, passes the checks that ship
with lorakit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli
from attrs import evolve

from lorakit.catalog import first_party, load_catalog
from lorakit.plugins import Plugin
from lorakit.testing import ConformanceError, check_plugin, conformance_cases

HERE = Path(__file__).parent
CONFIGS = tomli.loads((HERE / "family_configs.toml").read_text(encoding="utf-8"))
ROWS: dict[str, dict[str, Any]] = {
    "dataset: messages": {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    },
    "dataset: sharegpt": {
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    },
    "dataset: alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "dataset: text": {"text": "Words."},
    "dataset: quiz": {"question": "?", "answer": "!"},
}
OFFLINE = {"logger: wandb": {"mode": "offline"}}


def is_ours(plugin: Plugin) -> bool:
    """Whether this repository publishes it: others have samples of their own."""
    return plugin.distribution in {"lorakit", *(f.distribution for f in first_party())}


def installed_cases() -> list[Any]:
    samples: dict[str, Any] = dict(ROWS)
    samples |= {f"model family: {name}": config for name, config in CONFIGS.items()}
    samples["model source: local"] = str(HERE)
    catalog = load_catalog()
    catalog = evolve(catalog, plugins=tuple(p for p in catalog.plugins if is_ours(p)))
    cases = conformance_cases(catalog, samples=samples, options=OFFLINE)
    return [pytest.param(case.check, id=case.id) for case in cases]


@pytest.mark.parametrize("check", installed_cases())
def test_installed_plugins_conform(check: Callable[[], None]):
    check()


def test_every_family_that_is_installed_has_a_sample():
    offers = load_catalog().offers["model family"]
    ours = {name for name, found in offers.items() if any(is_ours(o.plugin) for o in found)}
    assert sorted(ours - set(CONFIGS)) == []


def test_plugins_of_others_are_not_this_repositorys_to_check(plant_sample: Callable[[str], str]):
    before = [case.id for case in installed_cases()]
    assert "lorakit[builtin] loads" in before
    plant_sample("model_families")
    assert "wee" in load_catalog().names("model family")
    assert [case.id for case in installed_cases()] == before


def test_safetensors_directories_conform(base_model: Path):
    from lorakit.testing import check_weight_format

    check_weight_format(load_catalog().get("weight format", "safetensors"), base_model)


SAMPLES = sorted(p.stem for p in (HERE / "samples").glob("*.py") if "faulty" not in p.stem)
WEE = {**CONFIGS["llama"], "model_type": "wee", "tie_word_embeddings": False}


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_plugins_conform(name: str, plant_sample: Callable[[str], str]):
    module = plant_sample(name)
    check_plugin(module.replace("_", "-"), samples={**ROWS, "model family: wee": WEE})


# (sample, text, what stands there instead, what the check says): each breaks one promise.
BROKEN = [
    ("model_families", 'model_types=("wee",)', "model_types=('we',)", "model_types lacks"),
    ("model_families", 'summary="wee"', 'summary=""', "summary"),
    ("model_families", 'summary="wee"', 'summary="a\\nb"', "more than one line"),
    ("model_families", 'name="wee"', 'name="Wee one"', "name: 'Wee one'"),
    ("model_families", "build(config)\n", "build({**config}).to('meta').model\n", "no `lm_head`"),
    ("model_families", "build(config)\n", "build(config).to_empty(device='cpu')\n", "has memory"),
    (
        "model_families",
        "return build(config)",
        "config['hidden_size']\n    return build(config)",
        "KeyError",
    ),
    (
        "model_families",
        "return build(config)",
        "model = build(config)\n"
        "    inner = model.hidden\n"
        "    from lorakit.modules import Layout\n"
        "    model.hidden = lambda t, l, c=None: inner(\n"
        "        t, l if c else Layout.of_lengths([len(t)]), c)\n"
        "    return model",
        "see each other",
    ),
    (
        "model_families",
        "return build(config)",
        "model = build(config)\n"
        "    inner = model.hidden\n"
        "    model.hidden = lambda t, l, c=None: inner(t, l, None)\n"
        "    return model",
        "cache",
    ),
    (
        "model_families",
        "return build(config)",
        "model = build(config)\n"
        "    inner = model.hidden\n"
        "    model.hidden = lambda t, l, c=None: inner(t, l, c).flip(0)\n"
        "    return model",
        "later",
    ),
    (
        "model_families",
        "return build(config)",
        "model = build(config)\n"
        "    inner = model.logits\n"
        "    model.logits = lambda h: inner(h).tanh()\n"
        "    return model",
        "logits_are_transformed",
    ),
    ("adapters", "torch.zeros(base", "torch.ones(base", "changes the output at the start"),
    ("adapters", "self.base = base", "self.inner = self.base = base", "parameter_prefix"),
    ("adapters", 'parameter_prefix="scale_"', 'parameter_prefix="rows_"', "parameter_prefix"),
    ("adapters", "(1 + tensors", "(1 - tensors", "merge"),
    (
        "adapters",
        'weight.float() * (1 + tensors["scale_rows"].float()).unsqueeze(1)',
        'weight.mul_((1 + tensors["scale_rows"]).unsqueeze(1))',
        "merge: writes",
    ),
    ("adapters", "tuple(config", "('k_proj',) or tuple(config", "from_config: picks other"),
    ("adapters", "targets: Endings", "names: Endings", "does not say what targets is"),
    ("quantizations", ".round().to(torch.int8)", "", "no fewer than bf16"),
    ("quantizations", "/ 127", "/ 300", "% off the weight"),
    ("quantizations", "return F.linear(x, ", "return F.linear(x.detach(), ", "RuntimeError"),
    ("quantizations", "self.dequantize(), self.bias)", "self.dequantize(), None)", "forward"),
    ("optimizers", "parameter.sub_(", "parameter.add_(", "raises the loss"),
    ("optimizers", 'alpha=group["lr"]', "alpha=options.lr", "with lr 0"),
    ("optimizers", 'state.setdefault("mean", ', "vars(self).setdefault(id(parameter), ", "other"),
    ("optimizers", "options=SignOptions", "options=object", "not an attrs class"),
    ("precisions", "return float(norm)", "return norm", "not the norm"),
    ("precisions", "max_norm or float", "max_norm and float", "clip"),
    ("precisions", "torch.float64", "'float64'", "no dtype"),
    ("precisions", 'notice = "precision', 'notice = "\\nprecision', "notice"),
    ("checkpointers", "for step in self.steps()[: -self.keep_last]", "for step in []", "keep_last"),
    ("checkpointers", "not in snapshot.kept_steps", "is not None", "kept_steps"),
    ("checkpointers", "self.kept = KEPT.setdefault(str(directory), {})", "self.kept = {}", "anew"),
    ("checkpointers", "sorted(self.kept)", "sorted(self.kept, key=str)", "steps"),
    ("checkpointers", "{k: v.clone() for k, v in snapshot.tensors.items()}", "{}", "other keys"),
    ("loggers", 'self.write("finish")', "self.path.unlink()", "FileNotFoundError"),
    ("datasets", "except KeyError as error", "except OSError as error", "not a ValueError"),
    ("datasets", '(Message("user"', '(Message("human"', "human"),
    ("datasets", 'Message("assistant", answer)', "{}", "returns dict as messages[1]"),
    ("model_sources", 'path.startswith("shelf:")', "True", "claims"),
    ("model_sources", 'examples=("shelf:NAME",)', "", "examples"),
    ("weight_formats", '(path / "weights.npz").is_file()', "path.exists()", "claims"),
    ("recipe_problems", "return []", "return None", "lorakit_recipe_problems returns None"),
    ("optimizers", "from attrs", "import torch\nfrom attrs", "imports torch"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "says"), BROKEN)
def test_a_plugin_that_breaks_its_contract_fails(
    name: str, right: str, wrong: str, says: str, plant: Callable[..., str]
):
    source = (HERE / "samples" / f"{name}.py").read_text(encoding="utf-8")
    assert right in source
    plant("lorakit-wrong", source.replace(right, wrong))
    samples = {**ROWS, "model family: wee": WEE, "model family: Wee one": WEE}
    with pytest.raises(ConformanceError) as caught:
        check_plugin("lorakit-wrong", samples=samples)
    assert says in str(caught.value)


def test_a_plugin_that_is_not_there_fails():
    with pytest.raises(ConformanceError, match="no plugin 'nothing' is installed"):
        check_plugin("nothing")


def test_a_broken_plugin_fails_with_its_reason(plant: Callable[..., str]):
    plant("lorakit-wrong", "raise RuntimeError('no such chip')\n")
    with pytest.raises(ConformanceError, match="broken: RuntimeError: no such chip"):
        check_plugin("wrong")


def test_a_family_without_a_sample_says_what_to_give():
    with pytest.raises(ConformanceError, match=r"samples=.*model family: llama"):
        check_plugin("lorakit-llama")


def test_all_problems_come_at_once(plant: Callable[..., str]):
    source = (HERE / "samples" / "loggers.py").read_text(encoding="utf-8")
    plant("lorakit-wrong", "import torch\n" + source.replace('summary="a', 'summary=" a'))
    with pytest.raises(ConformanceError) as caught:
        check_plugin("lorakit-wrong")
    assert len(str(caught.value).splitlines()) == 2


def test_archives_conform(plant_sample: Callable[[str], str], base_model: Path, tmp_path: Path):
    import numpy
    from safetensors.numpy import load_file

    from lorakit.testing import check_weight_format

    plant_sample("weight_formats")
    (tmp_path / "config.json").write_bytes((base_model / "config.json").read_bytes())
    numpy.savez(tmp_path / "weights.npz", **load_file(base_model / "model.safetensors"))
    check_weight_format(load_catalog().get("weight format", "npz"), tmp_path)
