"""A text longer than the model's context is told, and is no error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorakit.cli import main
from lorakit.context import context_length, prompt_notice, rows_notice
from lorakit.preview import preview_lines
from lorakit.recipes import resolve_recipe
from lorakit.run import dry_run


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}, 16384),
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "llama3", "factor": 8}},
         131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
         131072),
        ({"max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
         131072),
        ({"max_position_embeddings": 512, "rope_parameters": {"full_attention": {"factor": 8}}},
         512),
    ],
)  # fmt: skip
def test_the_context_is_what_the_positions_were_made_for(config: Any, expected: int | None):
    assert context_length(config) == expected


def test_only_rows_that_are_longer_are_told():
    config = {"max_position_embeddings": 100}
    assert rows_notice([20, 100], config, 4096) is None
    assert rows_notice([200], {}, 4096) is None
    notice = rows_notice([101, 20, 2300], config, 4096)
    assert notice is not None
    assert "data.max_seq_len: 4,096 is more than the model's context of 100 tokens" in notice
    assert "2 of 3 rows are longer, up to 2,300 tokens" in notice


def test_a_prompt_within_the_context_is_not_told():
    assert prompt_notice(100, 100) is None
    assert prompt_notice(100, None) is None
    assert "101 tokens, more than the model's context of 100" in str(prompt_notice(101, 100))


TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "x" * 400}]
LONG = [{"messages": TURNS}]


def test_a_run_says_so_once_and_goes_on(
    make_recipe: Callable[..., str], train_run: Callable[..., Any]
):
    told = "is more than the model's context of 256 tokens"
    long = resolve_recipe(make_recipe(LONG, data={"max_seq_len": 512}))
    assert sum(told in line for line in dry_run(long)) == 1
    assert sum(told in line for line in preview_lines(long, 0, color=False)) == 1
    cut = resolve_recipe(make_recipe(LONG, data={"max_seq_len": 256}))
    assert not any(told in line for line in dry_run(cut))
    assert (train_run(LONG, data={"max_seq_len": 512}) / "adapter").is_dir()


def test_generate_says_so_on_stderr(checkpoint: Any, capsys: pytest.CaptureFixture[str]):
    for prompt, told in (("what? " * 200, 1), ("what?", 0)):
        with pytest.raises(SystemExit) as exited:
            main(["generate", str(checkpoint), "--prompt", prompt, "--max-new-tokens", "2"])
        assert exited.value.code == 0
        err = capsys.readouterr().err
        assert err.count("more than the model's context of 256") == told
