"""Each precision's dtypes by device, the scaling of gradients, and runs in each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from lorakit.assemble import assemble
from lorakit.builtin import precisions
from lorakit.builtin.precisions import PlainPrecision, ScaledPrecision
from lorakit.errors import RecipeError, RunError, UserError
from lorakit.modules import Layout
from lorakit.options import NoOptions
from lorakit.progress import TerminalProgress
from lorakit.recipes import resolve_recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2 avx2 fma", False),
        ("fpu avx2 avx512f avx512_bf16", True),
        ("fpu avx512f amx_bf16", True),
        ("fp asimd bf16 i8mm", True),
    ],
)
def test_what_the_system_says_of_the_cpu(flags: str, expected: bool, tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert precisions.cpu_has_bf16(cpuinfo) is expected


def test_a_system_that_does_not_say(tmp_path: Path):
    assert precisions.cpu_has_bf16(tmp_path / "nowhere") is False


def dtypes(found):
    return found.storage, found.compute, found.adapter


BY_NAME = {"bf16": precisions.resolve_bf16, "bf16_pure": precisions.resolve_bf16_pure}
ADAPTER = {"bf16": FP32, "bf16_pure": BF16}


@pytest.mark.parametrize("name", BY_NAME)
def test_bf16_on_a_cpu_with_units(name, monkeypatch):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    found = BY_NAME[name](CPU, NoOptions())
    assert dtypes(found) == (BF16, BF16, ADAPTER[name])
    assert found.notice is None


@pytest.mark.parametrize("name", BY_NAME)
def test_bf16_on_a_cpu_without_units_is_stored_but_not_computed_with(name, monkeypatch):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: False)
    found = BY_NAME[name](CPU, NoOptions())
    assert dtypes(found) == (BF16, FP32, ADAPTER[name])
    assert "no bf16 units" in found.notice


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_cuda_asks_the_device(supported, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    found = BY_NAME[name](CUDA, NoOptions())
    expected = (BF16, BF16, ADAPTER[name]) if supported else (FP32, FP32, FP32)
    assert dtypes(found) == expected
    assert found.notice == (None if supported else "precision: Old GPU has no bf16; using fp32")


def test_fp16_on_cuda_keeps_the_adapter_in_fp32():
    assert dtypes(precisions.resolve_fp16(CUDA, NoOptions())) == (FP16, FP16, FP32)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp16_elsewhere_is_refused(device):
    with pytest.raises(UserError, match=r"fp16 is for CUDA devices.*\n.*bf16"):
        precisions.resolve_fp16(torch.device(device), NoOptions())


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_run_in_fp16_without_cuda_is_one_message(device, make_recipe):
    with pytest.raises(
        (RecipeError, UserError), match=r"precision\.name: fp16 is for CUDA"
    ) as caught:
        lorakit.train(make_recipe(precision={"name": "fp16"}, device=device))
    # Where the recipe names the device, before anything is loaded.
    assert isinstance(caught.value, RecipeError) == (device == "cpu")


@pytest.mark.parametrize(("typo", "meant"), [("bf15", "bf16"), ("bf16-pure", "bf16_pure")])
def test_a_precision_nobody_offers_names_the_nearest(typo, meant, make_recipe):
    with pytest.raises(RecipeError, match=f"precision.name.*{typo}.*{meant}"):
        lorakit.train(make_recipe(precision={"name": typo}))


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("quantization", [None, {"name": "nf4"}], ids=["plain", "nf4"])
def test_weights_as_the_checkpoint_has_them_are_the_same_run(
    quantization, make_checkpoint, train_run, tmp_path, read_metrics
):
    """Widening bf16 loses nothing: losses and adapter are those of weights kept in fp32."""
    from transformers import AutoModelForCausalLM

    base = make_checkpoint()
    rounded = tmp_path / "rounded"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(rounded)
    for file in base.glob("tokenizer*"):
        (rounded / file.name).write_bytes(file.read_bytes())
    settings = {"training": {"batch_size": 4}}
    if quantization:
        settings["quantization"] = quantization
    runs = [
        train_run(model=rounded, precision={"name": "fp32", "storage": storage}, **settings)
        for storage in ("fp32", "checkpoint")
    ]
    kept, narrow = ([line["loss"] for line in read_metrics(run)] for run in runs)
    assert narrow == pytest.approx(kept, rel=1e-6)
    table = {"name": "fp32", "storage": "checkpoint"}
    recipe = resolve_recipe(str(runs[1] / "recipe.toml"), overrides={"precision": table})
    parameters = assemble(recipe, TerminalProgress()).base.model.named_parameters()
    assert {p.dtype for n, p in parameters if "lora" not in n} == {BF16}


@pytest.mark.parametrize("units", [True, False], ids=["bf16_units", "no_bf16_units"])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_run_keeps_adapter_and_optimizer_state_in_their_dtype(
    name, units, train_run, monkeypatch
):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: units)
    run = train_run(precision={"name": name}, training={"batch_size": 4})
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    (last,) = (run / "checkpoints").glob("step-*")
    state = load_file(last / "training_state.safetensors")
    moments = {t.dtype for k, t in state.items() if k.endswith(("exp_avg", "exp_avg_sq"))}
    assert {t.dtype for t in saved.values()} == moments == {ADAPTER[name]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_stored_in_bf16_and_computed_in_fp32_is_fp32_over_rounded_weights(
    tied, dora, make_checkpoint, train_run, monkeypatch, tmp_path, read_metrics
):
    """The same run, with the base's weights rounded to bf16 in its file and loaded as fp32."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: False)
    base = make_checkpoint(tie_word_embeddings=tied)
    rounded = tmp_path / "rounded"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(rounded)
    for file in base.glob("tokenizer*"):
        (rounded / file.name).write_bytes(file.read_bytes())
    settings = {"adapter": {"dora": dora}, "training": {"batch_size": 4}}
    narrow = train_run(model=base, precision={"name": "bf16"}, **settings)
    plain = train_run(model=rounded, precision={"name": "fp32"}, **settings)
    for ours, theirs in zip(read_metrics(narrow), read_metrics(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("units", [True, False], ids=["bf16_units", "no_bf16_units"])
def test_weights_are_stored_once_and_in_bf16(units, make_recipe, monkeypatch):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: units)
    recipe = resolve_recipe(make_recipe(precision={"name": "bf16"}))
    run = assemble(recipe, TerminalProgress())
    base = [p for p in run.base.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in base} == {BF16}
    model = run.base.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    states = model.hidden(torch.tensor([1, 2]), Layout.of_lengths([2]))
    assert states.dtype == model.logits(states).dtype == (BF16 if units else FP32)


def test_wider_weights_than_fp32_are_not_kept_as_stored(make_checkpoint, make_recipe, tmp_path):
    base = make_checkpoint()
    for file in base.glob("*.safetensors"):
        save_file({n: t.double() for n, t in load_file(file).items()}, file, {"format": "pt"})
    precision = {"name": "fp32", "storage": "checkpoint"}
    run = assemble(resolve_recipe(make_recipe(model=base, precision=precision)), TerminalProgress())
    assert {p.dtype for p in run.base.model.parameters()} == {FP32}


def test_an_optimizer_that_cannot_hold_bf16_is_refused_before_the_run(make_recipe, monkeypatch):
    class Picky(torch.optim.SGD):
        def step(self, closure=None):
            if any(p.dtype != FP32 for p in self.param_groups[0]["params"]):
                raise RuntimeError("fp32 only")
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **_: Picky(parameters, lr=1.0))
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    lorakit.train(make_recipe(precision={"name": "bf16"}, training={"max_steps": 1}))
    with pytest.raises(UserError, match="adamw cannot hold bfloat16 parameters: fp32 only"):
        lorakit.train(make_recipe(precision={"name": "bf16_pure"}))


# ---------------------------------------------------------------- scaled gradients


def scaled(**settings):
    return ScaledPrecision(FP32, FP32, FP32, **settings)


def parameter_and_optimizer(values):
    parameter = nn.Parameter(torch.tensor(values))
    return parameter, torch.optim.SGD([parameter], lr=1.0)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 100.0])
def test_scaled_steps_are_those_of_unscaled_gradients(max_norm):
    ends = []
    for precision in (PlainPrecision(FP32, FP32, FP32), scaled(scale=2.0**12)):
        parameter, optimizer = parameter_and_optimizer([3.0, 4.0])
        for _ in range(2):
            precision.backward(parameter.square().sum() / 2)
        norm = precision.step(optimizer, max_norm)
        assert norm == pytest.approx(10.0)
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-6)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    precision = scaled(scale=2.0**127)
    parameter, optimizer = parameter_and_optimizer([3.0, 4.0])
    precision.backward(parameter.square().sum())
    assert precision.step(optimizer, 1.0) is None
    assert parameter.tolist() == [3.0, 4.0]
    assert (precision.scale, precision.skipped) == (2.0**126, 1)
    assert "1 step skipped" in precision.notice


def test_the_scale_grows_after_steps_without_an_overflow():
    precision = scaled(scale=4.0, growth_interval=3)
    parameter, optimizer = parameter_and_optimizer([1.0])
    scales = []
    for _ in range(7):
        optimizer.zero_grad()
        precision.backward(parameter.sum())
        precision.step(optimizer, 0.0)
        scales.append(precision.scale)
    assert scales == [4, 4, 8, 8, 8, 16, 16]


def test_gradients_that_overflow_without_a_scale_are_returned():
    precision = scaled(scale=1.0)
    parameter, optimizer = parameter_and_optimizer([1.0])
    precision.backward(parameter.sum() * float("inf"))
    assert precision.step(optimizer, 0.0) == float("inf")


@pytest.fixture
def scale_too_large(monkeypatch):
    """A run in fp32 whose gradients are scaled, at first by so much that their norm overflows."""
    monkeypatch.setattr(precisions, "PlainPrecision", lambda *_: scaled(scale=2.0**68))


def test_a_run_skips_steps_until_the_scale_fits_and_says_so(
    scale_too_large, train_run, make_rows, read_metrics, capsys
):
    loggers = [{"name": "terminal"}, {"name": "disk"}]
    run = train_run(make_rows(12), training={"batch_size": 1}, loggers=loggers)
    metrics = read_metrics(run)
    skipped = ["grad_norm" not in line for line in metrics]
    count = sum(skipped)
    assert 1 <= count < 12
    assert skipped == sorted(skipped, reverse=True)
    said = capsys.readouterr().out
    for step in range(1, count + 1):
        assert f"step {step} is skipped" in said
    state = json.loads((run / "checkpoints/step-00000012/training_state.json").read_text())
    assert json.dumps(2.0 ** (68 - count)) in json.dumps(state)
    assert load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_resumed_run_goes_on_with_its_scale(
    scale_too_large, make_recipe, make_rows, read_metrics, tmp_path
):
    recipe = make_recipe(make_rows(12), checkpointer={"every_steps": 1, "keep_last": 0})
    whole = lorakit.train(recipe).output
    shutil.copytree(whole, tmp_path / "cut")
    for step in range(7, 13):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    resumed = lorakit.train(recipe, output=tmp_path / "cut", resume=True).output
    file = "adapter/adapter_model.safetensors"
    assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def test_a_loss_that_is_not_finite_stops_a_scaled_run_too(scale_too_large, train_run, monkeypatch):
    from lorakit import loop

    real = loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", lambda *a: real(*a) * float("nan"))
    with pytest.raises(RunError, match="the loss is nan"):
        train_run()
