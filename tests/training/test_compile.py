"""training.compile gives the numbers of a run without, from one compilation for all lengths."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch

import lorakit
from lorakit import assemble, compilation
from lorakit.errors import RunError, UserError
from lorakit.modules import attention
from lorakit.modules.flash import has_flash

STEPS = {"max_steps": 3, "batch_size": 2, "gradient_accumulation_steps": 2}
LOGGERS = [{"name": "terminal"}, {"name": "disk"}]
needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compilation.CPU_COMPILERS)), reason="no C++ compiler here"
)


@pytest.fixture(autouse=True)
def from_nothing():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced_only(monkeypatch):
    """Blocks are traced as for a compiler, and what was traced is run by torch: that is quick."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def assert_same_losses(train_run, make_rows, read_metrics):
    rows = make_rows(12)

    def check(mode):
        training = {**STEPS, "activation_checkpointing": mode}
        plain, compiled = (
            read_metrics(
                train_run(rows, training={**training, "compile": compiled}, loggers=LOGGERS)
            )
            for compiled in (False, True)
        )
        for ours, theirs in zip(compiled, plain, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)

    return check


@needs_a_compiler
def test_losses_are_those_without(assert_same_losses, capsys):
    assert_same_losses("none")
    told = [line for line in capsys.readouterr().out.splitlines() if "compiling took" in line]
    assert len(told) == 1
    assert float(told[0].removeprefix("compiling took ").removesuffix(" s")) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("mode", ["selective", "block"])
def test_losses_are_those_without_under_checkpointing(mode, assert_same_losses):
    assert_same_losses(mode)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.usefixtures("traced_only")
def test_other_lengths_are_not_compiled_anew(train_run, make_rows, monkeypatch):
    if not has_flash(torch.empty(1, 2, 8), torch.empty(1, 1, 8)):
        pytest.skip("this torch's kernel has no query heads that share a key head")
    seen, frames = set(), []
    real = attention.flash_documents

    def watched(q, k, v, documents, scale):
        seen.add(str(documents))
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
        return real(q, k, v, documents, scale)

    monkeypatch.setattr(attention, "flash_documents", watched)
    training = {"compile": True, "batch_size": 3}
    train_run(make_rows(30), training=training)
    # It was called, so attention is on the fast path though the blocks around are compiled.
    assert len(seen) >= 8
    after_first_step = frames[2]
    assert frames[-1] == after_first_step


def test_a_missing_compiler_is_told_before_anything_is_loaded(make_recipe, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reference = make_recipe(training={"compile": True})
    with pytest.raises(UserError, match=r"training\.compile: .*no-such-compiler") as error:
        lorakit.train(reference)
    assert "training.compile = false" in str(error.value)


def test_a_compiler_that_fails_is_one_message(make_recipe, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("this graph is too hard")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setattr(assemble, "check_compiler", lambda device: None)
    with pytest.raises(RunError, match=r"training\.compile: .*too hard"):
        lorakit.train(make_recipe(training={"compile": True}))
