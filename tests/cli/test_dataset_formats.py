"""A format that returns what is no example, and rows that are another format's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lorakit.catalog import load_catalog
from lorakit.data.examples import make_example, other_formats
from lorakit.errors import UserError
from lorakit.options import DataOptions
from lorakit.protocols import Conversation, Message, Text
from lorakit.records import DatasetFormat

TURN = {"role": "user", "content": "Why?"}


def broken(example: Callable[[Mapping[str, Any], Any], Any]) -> DatasetFormat:
    return DatasetFormat(name="quiz", summary="quizzes", options=DataOptions, example=example)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returns NoneType as an example, expected lorakit.protocols.Conversation or"),
        ([TURN], "returns list as an example"),
        (Conversation((TURN,)), "returns dict as messages[0], expected lorakit.protocols.Message"),  # type: ignore[arg-type]
        (Conversation({"a": 1}), "returns dict as Conversation.messages, expected tuple"),  # type: ignore[arg-type]
        (Conversation((Message("user", None),)), "returns NoneType as messages[0].content"),  # type: ignore[arg-type]
        (Text(b"no"), "returns bytes as Text.text, expected str"),  # type: ignore[arg-type]
    ],
)
def test_a_format_that_returns_what_is_no_example_is_blamed(returned: Any, said: str):
    with pytest.raises(UserError) as error:
        make_example(broken(lambda row, options: returned), {}, None, "x.jsonl, line 1")
    assert said in error.value.message
    assert "plugin of 'quiz' is wrong, not the data" in error.value.message
    assert "x.jsonl, line 1" in error.value.message


def test_a_format_that_raises_something_else_is_blamed():
    with pytest.raises(UserError, match=r"raises KeyError: 'question', expected a ValueError"):
        make_example(broken(lambda row, options: row["question"]), {}, None, "line 1")


def test_a_list_of_messages_will_do():
    example = Conversation([Message("user", "Why?")])  # type: ignore[arg-type]
    assert make_example(broken(lambda row, options: example), {}, None, "line 1") is example


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ALPACA, ["alpaca"]),
        ({"text": "Words."}, ["text"]),
        ({**ALPACA, "text": "Add 1 2: 3"}, ["alpaca", "text"]),
        ({"question": "?"}, []),
    ],
)
def test_the_formats_that_read_a_row(row: Any, expected: list[str]):
    catalog = load_catalog()
    assert other_formats(row, catalog.get("dataset", "messages"), catalog) == expected


def test_rows_of_another_format_are_told_with_the_setting(
    make_recipe: Callable[..., str], cli: Callable[..., Any]
):
    done = cli("train", make_recipe([ALPACA] * 2), "--dry-run")
    assert done.status == 2
    assert "no key 'messages'; the row has instruction, input and output" in done.err
    assert done.err.count('The row fits another format: use data.name = "alpaca".') == 1


def test_eval_reads_as_the_run_did(
    train_run: Callable[..., Path], cli: Callable[..., Any], checkpoint: Path, tmp_path: Path
):
    rows = [{"chat": {"q": "no"}, "body": "the model learns a small update"}] * 4
    run = train_run(rows, data={"name": "text", "column": "body"}, training={"max_steps": 1})
    data = run.parent / "data.jsonl"
    done = cli("eval", run, "--data", data)
    assert done.status == 0, done.err
    assert cli("eval", run / "adapter", "--data", data).out == done.out
    named = tmp_path / "named.jsonl"
    named.write_text("".join(json.dumps({"text": row["body"]}) + "\n" for row in rows))
    assert cli("eval", run, "--data", named, "--format", "text").out == done.out
    without = cli("eval", checkpoint, "--data", named)
    assert without.status == 2
    assert "The row fits another format: use --format text." in without.err


def test_eval_says_what_it_left_out(
    train_run: Callable[..., Path], cli: Callable[..., Any], make_rows: Callable[..., Any]
):
    run = train_run(training={"max_steps": 1}, data={"max_seq_len": 128})
    rows = make_rows(3)
    rows[1]["messages"][0]["content"] = "Why? " * 200
    data = run.parent / "other.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("eval", run, "--data", data)
    assert done.status == 0, done.err
    assert done.out.endswith("of 2 rows\n")
    assert "data: 1 rows left out, of which no trained token remains" in done.err


def test_rows_wrapped_in_an_object_are_told(
    make_recipe: Callable[..., str], cli: Callable[..., Any], tmp_path: Path
):
    wrapped, single = tmp_path / "wrapped.json", tmp_path / "single.json"
    wrapped.write_text('{"data": []}')
    single.write_text(json.dumps({"messages": [TURN, {"role": "assistant", "content": "So."}]}))
    done = cli("preview", make_recipe(data={"path": str(wrapped)}))
    assert done.status == 2
    assert "The file holds one object: expected is [{...}, ...], or an object a line." in done.err
    assert cli("preview", make_recipe(data={"path": str(single)})).status == 0


def test_a_split_of_a_local_file_is_a_problem_of_the_recipe(
    make_recipe: Callable[..., str], cli: Callable[..., Any]
):
    done = cli("recipes", "validate", make_recipe(data={"split": "test"}))
    assert done.status == 2
    assert "  data.split: 'test' is of a data set on the hub, but data.path " in done.err


SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "How late is it?"},
        {"from": "function_call", "value": "clock()", "train": False},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Noon."},
    ]
}


def sharegpt(row: Mapping[str, Any], **options: str) -> Any:
    form = load_catalog().get("dataset", "sharegpt")
    return form.example(row, form.options(path="x.jsonl", **options))


def test_sharegpt_rows_are_conversations():
    messages = sharegpt(SHAREGPT).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [m.trained for m in messages] == [None, None, False, None, None]
    assert messages[4].content == "Noon."
    others = [{"from": name, "value": "x"} for name in ("user", "assistant", "tool")]
    found = sharegpt(
        {"chat": [*others, {"from": "function_response", "value": "x"}]}, column="chat"
    )
    assert [m.role for m in found.messages] == ["user", "assistant", "tool", "tool"]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"from": "gtp", "value": "x"}, "conversations[0].from: 'gtp' is none of "),
        ({"from": "gtp", "value": "x"}, "(did you mean 'gpt'?)"),
        ({"from": "gpt"}, "conversations[0].value: expected a string, got None"),
        ({"from": "human", "value": "x", "train": True}, "only an assistant's turn"),
        ({"role": "user", "content": "x"}, "is the format messages with column = 'conversations'"),
        ("x", "conversations[0]: expected {from, value}, got 'x'"),
    ],
)
def test_sharegpt_rows_of_another_shape(turn: Any, said: str):
    with pytest.raises(ValueError) as error:
        sharegpt({"conversations": [turn]})
    assert said in str(error.value)


def test_sharegpt_trains_what_messages_does(
    make_recipe: Callable[..., str], make_rows: Callable[..., Any], cli: Callable[..., Any]
):
    rows = make_rows(3)
    speakers = {"user": "human", "assistant": "gpt"}
    spoken = [
        {
            "conversations": [
                {"from": speakers[m["role"]], "value": m["content"]} for m in row["messages"]
            ]
        }
        for row in rows
    ]
    shown = [
        cli("preview", make_recipe(data_rows, data={"name": name}), "--rows", 3).out
        for name, data_rows in (("messages", rows), ("sharegpt", spoken))
    ]
    lines = [[line for line in text.splitlines() if "line " not in line] for text in shown]
    assert "«" in shown[0]
    assert lines[0] == lines[1]
    wrong = cli("preview", make_recipe(spoken))
    assert 'use data.name = "sharegpt".' in wrong.err


def test_sharegpt_is_listed(cli: Callable[..., Any]):
    assert "sharegpt" in cli("plugins", "list").out
