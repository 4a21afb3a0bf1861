"""Leaving a technique out changes what a run costs, and nothing that it computes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import lorakit
from tests.bench.processes import ROOT
from tests.bench.without import REPLACED, without


@pytest.fixture
def losses(make_recipe, tmp_path):
    recipe = make_recipe(training={"max_steps": 3}, data={"packed": True, "max_seq_len": 128})

    def losses(name):
        lorakit.train(recipe, output=tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    return losses


@pytest.mark.parametrize("technique", REPLACED)
def test_losses_are_the_same(technique, losses):
    replaced = REPLACED[technique]
    own = [getattr(module, name) for module, name, _ in replaced]
    expected = losses("with")
    with without(technique):
        for module, name, replacement in replaced:
            assert getattr(module, name) is replacement
        assert losses("without") == pytest.approx(expected, rel=1e-5)
    assert [getattr(module, name) for module, name, _ in replaced] == own
    assert len(set(expected)) == 3


def test_the_command_trains(make_recipe, tmp_path):
    recipe = make_recipe(training={"max_steps": 1})
    command = [sys.executable, "-m", "tests.bench.without", "trained-only", recipe]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")], cwd=ROOT, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter").is_dir()
