"""Runs over a base model that has a SentencePiece file and no chat template."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from lorakit.cli import main
from lorakit.data.encode import encode_example
from lorakit.generation import prompt_ids
from lorakit.mergeable import merge_trained
from lorakit.protocols import Conversation, Message
from lorakit.trained import load_trained

ROWS = [{"instruction": f"Say {n}.", "output": f"{n} it is."} for n in ("one", "two", "six")]


@pytest.fixture
def base(checkpoint, tmp_path, write_model):
    """The tiny checkpoint with tokenizer.model in the place of its tokenizer.json."""
    directory = tmp_path / "base"
    shutil.copytree(checkpoint, directory)
    for path in directory.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template", "generation_")):
            path.unlink()
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    words = ["▁S", "ay", "▁Say", "▁i", "▁it"]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    letters = "▁.#:abcdefghijklmnopqrstuvwxyzSIRBAW"
    pieces += [(letter, -1000.0 - rank, 1) for rank, letter in enumerate(letters)]
    (directory / "tokenizer.model").write_bytes(write_model(pieces))
    return directory


def test_without_a_format_the_run_is_refused_before_weights_are_read(base, make_recipe, capsys):
    recipe = make_recipe(ROWS, model=base, data={"name": "alpaca"})
    with pytest.raises(SystemExit) as stopped:
        main(["train", recipe])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "data.chat_template: the model's tokenizer has no chat template of its own" in error
    assert "Set it to one of alpaca, llama2 and mistral" in error
    assert "Traceback" not in error


def test_what_a_run_leaves_tokenizes_and_stops_as_training_did(base, train_run, tmp_path):
    data = {"name": "alpaca", "chat_template": "alpaca", "max_seq_len": 240}
    run = train_run(ROWS, model=base, data=data)
    trained = load_trained(str(run), "cpu")
    merge_trained(str(run), tmp_path / "merged")
    question, answer = Message("user", "Say two."), Message("assistant", "two it is.")
    ids = encode_example(
        Conversation((question, answer)), trained.tokenizer, train_on_prompt=False
    ).ids
    assert (ids[0], ids.count(1)) == (1, 1)
    prompt = prompt_ids(trained.tokenizer, "Say two.")
    assert prompt == list(ids[: len(prompt)])
    assert trained.tokenizer.decode(ids[len(prompt) :]).strip() == "two it is."
    assert trained.tokenizer.stop_ids == {2}
    for directory in (run / "adapter", tmp_path / "merged"):
        theirs = AutoTokenizer.from_pretrained(directory)
        chat = [{"role": m.role, "content": m.content} for m in (question, answer)]
        assert theirs.apply_chat_template(chat, return_dict=False) == list(ids)
        assert (theirs.eos_token_id, theirs.pad_token_id) == (2, 0)
        generation = json.loads((directory / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [2]
