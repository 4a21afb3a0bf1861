"""Batches made ahead by a thread are the same, and the thread never outlives its use."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit
from lorakit import loop
from lorakit.builtin.loggers import DiskLogger
from lorakit.data.ahead import WINDOWS_AHEAD, ahead, prepared
from lorakit.errors import Interrupted


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "lorakit-batches"]


@given(st.lists(st.integers()), st.integers(1, 4))
def test_the_same_items_in_the_same_order(items, depth):
    assert list(ahead(iter(items), depth)) == items
    assert not threads()


def test_they_are_made_while_one_is_in_use_and_not_without_end():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    given_out = ahead(items())
    assert next(given_out) == 0
    deadline = time.monotonic() + 10
    while len(made) < 2 + WINDOWS_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # The one in use, those that wait, and the one that has no place yet.
    assert made == list(range(2 + WINDOWS_AHEAD))
    given_out.close()
    assert not threads()


def test_what_making_one_raises_comes_in_its_place():
    def items():
        yield 1
        yield 2
        raise ValueError("row 3 is broken")

    found = []
    with pytest.raises(ValueError, match="row 3 is broken"):
        found.extend(ahead(items()))
    given_out = ahead(items())
    assert [next(given_out), next(given_out)] == [1, 2]
    with pytest.raises(ValueError, match="row 3 is broken"):
        next(given_out)
    assert not threads()


def test_a_loop_that_breaks_or_raises_leaves_no_thread():
    for item in ahead(iter(range(100))):
        if item == 3:
            break
    gc.collect()
    assert not threads()

    def run():
        for item in ahead(iter(range(100))):
            if item == 3:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        run()
    gc.collect()
    assert not threads()


def test_on_a_cpu_there_is_no_thread():
    windows = iter([])
    assert prepared(windows, torch.device("cpu")) is windows
    assert not threads()


def test_a_run_is_the_same_and_resumes_exactly(make_recipe, make_rows, tmp_path, monkeypatch):
    training = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2}
    reference = make_recipe(make_rows(21), training=training, adapter={"dropout": 0.2})
    plain = lorakit.train(reference, output=tmp_path / "plain")
    used = []

    def made_ahead(windows, device):
        used.append(device)
        return ahead(windows)

    monkeypatch.setattr(loop, "prepared", made_ahead)
    whole = lorakit.train(reference, output=tmp_path / "ahead")
    assert len(used) == 2
    log = DiskLogger.metrics

    def metrics(self, values):
        log(self, values)
        if values["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(DiskLogger, "metrics", metrics)
        with pytest.raises(Interrupted):
            lorakit.train(reference, output=tmp_path / "stopped")
    lorakit.train(reference, output=tmp_path / "stopped", resume=True)
    file = "adapter/adapter_model.safetensors"
    expected = (plain.output / file).read_bytes()
    for run in (whole.output, tmp_path / "stopped"):
        assert (run / file).read_bytes() == expected
    gc.collect()
    assert not threads()
