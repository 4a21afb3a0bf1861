"""Files that are wrong: `lorakit train` says which and where, exits 2, and leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import UserError
from lorakit.recipes import resolve_recipe
from lorakit.run_directory import write_recipe

Cli = Callable[..., Any]
MakeRecipe = Callable[..., str]


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    """`refused(reference, *options)` trains what must be refused; returns the message."""

    def refused(reference: str, *options: object) -> str:
        folder = folder_of(reference)
        before = everything_in(folder)
        done = cli("train", reference, *options)
        assert done.status == 2, done.err
        assert done.err.startswith("error: ")
        assert "Traceback" not in done.err
        assert everything_in(folder) == before
        return str(done.err)

    return refused


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A model directory of the test's own, to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def folder_of(reference: str) -> Path:
    return Path(reference.removesuffix(":tiny")).parent


def everything_in(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_tensors(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# The base model.


def test_no_config(refused: Any, model: Path, make_recipe: MakeRecipe) -> None:
    (model / "config.json").unlink()
    message = refused(make_recipe(model=model))
    assert f"model.path: {model} has no config.json" in message


def test_no_weights(refused: Any, model: Path, make_recipe: MakeRecipe) -> None:
    (model / "model.safetensors").unlink()
    message = refused(make_recipe(model=model))
    assert f"model.path: {model} holds no weights in a known format" in message


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_safetensors(
    kept: int, refused: Any, model: Path, make_recipe: MakeRecipe
) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refused(make_recipe(model=model))
    assert f"{file}: not a readable safetensors file" in message
    assert "truncated" in message


def test_missing_shard(
    refused: Any, make_checkpoint: Callable[..., Path], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    model = Path(shutil.copytree(make_checkpoint(max_shard_size="40KB"), tmp_path / "sharded"))
    shards = sorted(p.name for p in model.glob("model-*.safetensors"))
    assert len(shards) > 1
    (model / shards[1]).unlink()
    message = refused(make_recipe(model=model))
    assert f"{model}: 1 of {len(shards)} weight files are missing: {shards[1]}" in message


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', "{", "[]"])
def test_malformed_index(index: str, refused: Any, model: Path, make_recipe: MakeRecipe) -> None:
    file = model / "model.safetensors.index.json"
    file.write_text(index, encoding="utf-8")
    assert f"{file}: " in refused(make_recipe(model=model))


def test_tensors_that_do_not_fit_are_listed_at_once(
    refused: Any, model: Path, make_recipe: MakeRecipe
) -> None:
    query = "model.layers.0.self_attn.q_proj.weight"

    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors["model.norm.weight"].clone()
        tensors[query] = tensors[query][:-1].clone()

    edit_tensors(model, change)
    message = refused(make_recipe(model=model))
    assert f"{model}: the tensors do not fit config.json (3 problems)" in message
    assert "missing: model.layers.1.mlp.up_proj.weight [48, 32]" in message
    assert "unexpected: model.layers.9.mlp.up_proj.weight [32]" in message
    assert f"shape: {query} is [31, 32], config.json says [32, 32]" in message


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_config_lacks_a_field(key: str, refused: Any, model: Path, make_recipe: MakeRecipe) -> None:
    edit_json(model / "config.json", lambda config: config.pop(key))
    assert f"config.json: {key} is missing" in refused(make_recipe(model=model))


def test_config_of_another_family(refused: Any, model: Path, make_recipe: MakeRecipe) -> None:
    edit_json(model / "config.json", lambda config: config.update(model_type="mamba"))
    message = refused(make_recipe(model=model))
    assert "model.name: 'llama' builds model_type llama" in message
    assert "'mamba'" in message


@pytest.mark.parametrize("text", ["", "{", "[1, 2]"])
def test_malformed_config(text: str, refused: Any, model: Path, make_recipe: MakeRecipe) -> None:
    (model / "config.json").write_text(text, encoding="utf-8")
    assert f"{model / 'config.json'}: " in refused(make_recipe(model=model))


def test_no_tokenizer(refused: Any, model: Path, make_recipe: MakeRecipe) -> None:
    (model / "tokenizer.json").unlink()
    assert f"{model}: no tokenizer.json" in refused(make_recipe(model=model))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b'{"model": ', b"[1]", b"\xff\xfe"])
def test_malformed_tokenizer(
    file: str, content: bytes, refused: Any, model: Path, make_recipe: MakeRecipe
) -> None:
    (model / file).write_bytes(content)
    message = refused(make_recipe(model=model))
    assert f"{model}: the tokenizer's files cannot be read" in message


def test_unreadable_gguf(refused: Any, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    file = tmp_path / "garbage.gguf"
    file.write_bytes(bytes(range(256)) * 20)
    assert f"{file}: " in refused(make_recipe(model=file))


# The data.


def good_line() -> str:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    return json.dumps({"messages": turns})


def with_third_line(line: str, make_recipe: MakeRecipe) -> tuple[str, str]:
    """A recipe whose data file has this line behind two good ones, and the line's place."""
    reference = make_recipe()
    file = folder_of(reference) / "data.jsonl"
    file.write_text("\n".join([good_line(), good_line(), line, good_line()]), encoding="utf-8")
    return reference, f"{file}, line 3"


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_data_file(content: str, refused: Any, make_recipe: MakeRecipe) -> None:
    reference = make_recipe()
    file = folder_of(reference) / "data.jsonl"
    file.write_text(content, encoding="utf-8")
    assert f"{file}: the file holds no row" in refused(reference)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("rows.jsonl", '{"messages": []\n', ", line 1: {} (column 16)"),
        ("rows.jsonl", '{"messages": []  \r\n', ", line 1: {} (column 16)"),
        ("rows.jsonl", '{"messages" []}\n', ", line 1: {} (column 13)"),
        ("rows.json", '[\n{"messages": []\n\n', ": {} (line 2, column 16)"),
    ],
)
def test_where_json_ends_too_soon(
    name: str, text: str, place: str, refused: Any, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode())
    what = "':'" if '" []' in text else "','"
    expected = place.format(f"not valid JSON: Expecting {what} delimiter")
    assert f"{file}{expected}" in refused(make_recipe(data={"path": str(file)}))


@pytest.mark.parametrize("line", ['{"messages": [', "no json", '{"messages": []} x'])
def test_malformed_line(line: str, refused: Any, make_recipe: MakeRecipe) -> None:
    reference, place = with_third_line(line, make_recipe)
    assert f"{place}: not valid JSON" in refused(reference)


def test_line_that_is_no_object(refused: Any, make_recipe: MakeRecipe) -> None:
    reference, place = with_third_line("[1]", make_recipe)
    assert f"{place}: expected an object, got list" in refused(reference)


def test_data_that_is_not_utf8(refused: Any, make_recipe: MakeRecipe) -> None:
    reference = make_recipe()
    file = folder_of(reference) / "data.jsonl"
    file.write_bytes(good_line().encode() + b"\n\xff\xfe\n")
    assert f"{file}: cannot be read" in refused(reference)


def test_malformed_json_list(refused: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text(f"[{good_line()},\n{good_line()},\n]", encoding="utf-8")
    message = refused(make_recipe(data={"path": str(file)}))
    assert f"{file}: not valid JSON" in message
    assert "line " in message


MESSAGE = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"mesages": [MESSAGE]}, "no key 'messages' (did you mean 'mesages'?)"),
        ({}, "no key 'messages'"),
        ({"messages": []}, "messages: expected a list of messages, got []"),
        ({"messages": ["Why?"]}, "messages[0]: expected {role, content}, got 'Why?'"),
        ({"messages": [MESSAGE, {"role": "asistant", "content": "So."}]}, "messages[1].role: "),
        (
            {"messages": [{"role": "asistant", "content": "So."}]},
            "'asistant' is none of system, user, assistant and tool (did you mean 'assistant'?)",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content: expected a string, got None"),
        ({"messages": [MESSAGE]}, "no token of this row is trained"),
    ],
)
def test_wrong_row(
    row: Mapping[str, Any], expected: str, refused: Any, make_recipe: MakeRecipe
) -> None:
    reference, place = with_third_line(json.dumps(row), make_recipe)
    message = refused(reference)
    assert f"{place}: " in message
    assert expected in message


# The recipe's fit to the machine, the model and the disk.


def test_output_that_holds_a_run(
    refused: Any, cli: Cli, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    output = tmp_path / "mine"
    assert cli("train", make_recipe(), "--output", output).status == 0
    before = everything_in(output)
    message = refused(make_recipe(), "--output", output)
    assert f"output: {output} holds a run already" in message
    assert "--resume" in message
    assert everything_in(output) == before


def test_output_that_is_a_file(refused: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    output.write_text("precious", encoding="utf-8")
    assert f"output: {output} is a file" in refused(make_recipe(output=str(output)))
    assert output.read_text(encoding="utf-8") == "precious"


def test_output_that_cannot_be_made(refused: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("precious", encoding="utf-8")
    output = file / "run"
    message = refused(make_recipe(output=str(output)))
    assert f"output: {output} cannot be made: {file} is a file" in message


def test_output_that_the_file_system_does_not_take(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("precious", encoding="utf-8")
    recipe = resolve_recipe(make_recipe(output=str(file / "run")))
    with pytest.raises(UserError, match="cannot be written to"):
        write_recipe(recipe)


def test_no_cuda(refused: Any, make_recipe: MakeRecipe) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "device: this machine has no cuda" in refused(make_recipe(device="cuda"))


@pytest.mark.parametrize("targets", [["q_proj", "v_prj"], "v_prj"])
def test_target_that_matches_nothing(
    targets: object, refused: Any, make_recipe: MakeRecipe
) -> None:
    message = refused(make_recipe(adapter={"targets": targets}))
    assert "adapter.targets: no linear layer matches 'v_prj' (did you mean 'v_proj'?)" in message


def test_wrong_rows_are_told_together(refused: Any, make_recipe: MakeRecipe) -> None:
    reference = make_recipe()
    file = folder_of(reference) / "data.jsonl"
    bad = ["no json", '{"messages": []}', "[1]", "{}"]
    file.write_text("\n".join([good_line(), *bad, good_line()]), encoding="utf-8")
    lines = refused(reference).splitlines()
    assert lines[0] == "error: data: 4 problems:"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        f"{file}, line {n}" for n in (2, 3, 4, 5)
    ]
    file.write_text("\n".join([good_line(), *bad * 5]), encoding="utf-8")
    lines = refused(reference).splitlines()
    assert lines[0] == "error: data: the first 10 problems:"
    assert len(lines) == 11


def test_a_tokenizer_of_another_model(
    make_checkpoint: Callable[..., Path], make_recipe: MakeRecipe, refused: Callable[..., str]
) -> None:
    """Known once the data are tokenized, before any weight is loaded."""
    message = refused(make_recipe(model=make_checkpoint(vocab_size=40)))
    assert "model.path: " in message
    assert "the model has only 40" in message
    assert ", line 1, " in message
