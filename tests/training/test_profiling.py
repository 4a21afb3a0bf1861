"""training.profile: a trace of two early steps, and what they spend their time on."""

from __future__ import annotations

import json

import pytest
import torch

import lorakit
from lorakit.errors import RunError
from lorakit.logs import LoggerGroup
from lorakit.profiling import profiled

TRAINING = {"batch_size": 2, "gradient_accumulation_steps": 2, "profile": True}


def optimizer_steps(trace) -> int:
    """In a trace, by torch's own mark around each."""
    events = json.loads(trace.read_text())["traceEvents"]
    return sum("Optimizer.step#" in str(e.get("name")) for e in events)


@pytest.mark.parametrize(("steps", "recorded"), [(6, 2), (4, 2), (3, 1), (2, 1), (1, 1)])
def test_two_steps_are_recorded_or_what_there_is(steps, recorded, train_run, make_rows, capsys):
    run = train_run(
        make_rows(24),
        training={**TRAINING, "max_steps": steps},
        loggers=[{"name": "terminal"}, {"name": "disk"}],
    )
    assert optimizer_steps(run / "profile" / "trace.json") == recorded
    table = (run / "profile" / "operations.txt").read_text()
    said = capsys.readouterr().out
    assert table in said
    assert f"profile of {recorded} steps: {run / 'profile' / 'trace.json'}" in said


def test_the_table_has_the_ten_costliest_first(train_run, make_rows):
    run = train_run(make_rows(24), training={**TRAINING, "max_steps": 4})
    head, *lines = (run / "profile" / "operations.txt").read_text().splitlines()
    assert head.split() == ["ms/step", "share", "calls/step", "operation"]
    assert len(lines) == 10
    spent = [float(line.split()[0]) for line in lines]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > 0
    assert 0 < sum(float(line.split()[1].rstrip("%")) for line in lines) <= 100.5
    assert any("aten::" in line for line in lines)


def test_a_run_that_fails_while_recorded_still_leaves_its_profile(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.ones(3, 3)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def run() -> None:
        with profiled(optimizer, 10, tmp_path, LoggerGroup()):
            for _ in range(2):
                optimizer.step()
            torch.mm(weight, weight)
            raise RunError("no more")

    with pytest.raises(RunError):
        run()
    assert "aten::mm" in (tmp_path / "operations.txt").read_text()


def test_one_that_ends_before_leaves_none_and_the_optimizer_is_left_as_it_was(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with profiled(optimizer, 10, tmp_path, LoggerGroup()):
        optimizer.step()
    for _ in range(5):
        optimizer.step()
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_are_those_without(make_recipe, make_rows, read_metrics):
    rows = make_rows(16)
    plain, recorded = (
        lorakit.train(make_recipe(rows, training={**TRAINING, "profile": profile})).output
        for profile in (False, True)
    )
    file = "adapter/adapter_model.safetensors"
    assert (plain / file).read_bytes() == (recorded / file).read_bytes()
    assert not (plain / "profile").exists()


def test_a_run_with_no_step_left_records_nothing(tmp_path):
    """A finished run that is resumed."""
    weight = torch.nn.Parameter(torch.ones(2))
    with profiled(torch.optim.SGD([weight], lr=0.1), 0, tmp_path, LoggerGroup()):
        assert not torch.autograd._profiler_enabled()
    assert list(tmp_path.iterdir()) == []
