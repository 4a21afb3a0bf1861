"""Chats: what the model is given turn by turn, and answers as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from attrs import evolve

import lorakit
from lorakit.chat import END_OF_TURN, LENGTH, Chat
from lorakit.generation import GREEDY, Sampling
from lorakit.trained import Trained, load_trained

Cli = Callable[..., Any]
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
LEAVES_OUT = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
SYSTEM = "Be brief."
WORDS = ("the model", "a row", "tokens", "one step", "weights", "an answer")


def rows() -> list[dict[str, Any]]:
    """Chats of three turns, in which each word follows and comes after others."""
    found = []
    for first in range(len(WORDS)):
        turns = [{"role": "system", "content": SYSTEM}]
        for step in range(3):
            word = WORDS[(first + step * (first + 1)) % len(WORDS)]
            turns.append({"role": "user", "content": f"Say {word}"})
            turns.append({"role": "assistant", "content": f"{word} {word}"})
        found.append({"messages": turns})
    return found


def silent(_: str) -> None:
    pass


def told(_: str) -> None:
    raise AssertionError("a warning")


def chat_of(trained: Trained, **more: Any) -> Chat:
    settings = {"system": SYSTEM, "max_new_tokens": 16, "context": trained.context, **more}
    return Chat(trained.model, trained.tokenizer, **{"sampling": GREEDY, **settings})


@pytest.fixture(scope="module")
def merged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to end its turns, behind the system message."""
    folder = tmp_path_factory.mktemp("chats")
    lines = "".join(json.dumps(row) + "\n" for row in rows())
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
    table = {
        "output": str(folder / "run"),
        "device": "cpu",
        "model": {"name": "llama", "path": str(checkpoint)},
        "adapter": {"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
        "optimizer": {"name": "adamw", "lr": 2e-2},
        "data": {"name": "messages", "path": str(folder / "data.jsonl")},
        "training": {"epochs": 30, "batch_size": 2},
        "checkpointer": {"name": "safetensors", "save_merged": True},
        "loggers": [{"name": "disk"}],
    }
    (folder / "chats.toml").write_text(tomli_w.dumps({"chats": table}), encoding="utf-8")
    return lorakit.train(f"{folder / 'chats.toml'}:chats").output / "merged"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trained], list[int]]:
    """`passes(trained)` -> tokens of each forward pass from then on."""

    def watch(trained: Trained) -> list[int]:
        lengths: list[int] = []
        hidden = trained.model.hidden

        def watched(tokens: Any, *more: Any) -> Any:
            lengths.append(len(tokens))
            return hidden(tokens, *more)

        monkeypatch.setattr(trained.model, "hidden", watched)
        return lengths

    return watch


def test_turns_are_answered_as_transformers_answers_them(
    merged: Path, passes: Callable[[Trained], list[int]]
) -> None:
    """The second and third by what is cached: only what is new is encoded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    trained = load_trained(str(merged), "cpu")
    chat = chat_of(trained)
    messages = [{"role": "system", "content": SYSTEM}]
    cached = 0
    for prompt in ("Say tokens", "Say a row", "Say weights"):
        messages.append({"role": "user", "content": prompt})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        found = reference.generate(
            ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=16
        )[0, ids.shape[1] :]
        lengths = passes(trained)
        pieces: list[str] = []
        answer = chat.ask(prompt, pieces.append, told)
        assert answer.text == "".join(pieces) == tokenizer.decode(found, skip_special_tokens=True)
        assert answer.stopped == END_OF_TURN
        assert answer.tokens == len(found) - 1 > 0
        assert lengths[0] == ids.shape[1] - cached
        cached = ids.shape[1] + answer.tokens
        messages.append({"role": "assistant", "content": answer.text})
    chat.reset()
    assert chat.ask("Say tokens", silent, told).text == messages[2]["content"]


def test_a_template_that_rewrites_earlier_turns(
    merged: Path, passes: Callable[[Trained], list[int]]
) -> None:
    """The cache is of no use then, and changes no answer."""
    trained = load_trained(str(merged), "cpu")
    template = trained.tokenizer.template
    assert template is not None
    rewrites = template.replace(
        "message['content']",
        "(message['content'] | upper if message['role'] == 'assistant' else message['content'])",
    )
    trained = evolve(trained, tokenizer=evolve(trained.tokenizer, template=rewrites))
    chat = chat_of(trained)
    chat.ask("Say tokens", silent, told)
    fresh = chat_of(trained)
    fresh.turns += chat.turns
    lengths = passes(trained)
    whole = fresh.ask("Say a row", silent, told)
    first, count = lengths[0], len(lengths)
    assert chat.ask("Say a row", silent, told).text == whole.text
    assert lengths[count] == first


def test_what_was_shown_of_a_stopped_answer_is_kept(checkpoint: Path) -> None:
    trained = load_trained(str(checkpoint), "cpu")
    chat = chat_of(trained)
    shown: list[str] = []

    def stop(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("Say tokens", stop, told)
    assert [turn.content for turn in chat.turns] == ["Say tokens", "".join(shown)]
    fresh = chat_of(trained)
    fresh.turns += chat.turns
    assert all(shown)
    following = fresh.ask("Say a row", silent, told).text
    assert chat.ask("Say a row", silent, told).text == following
    assert chat_of(trained).ask("Say a row", silent, told).text != following


def test_a_pass_that_is_stopped_halfway_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer has cached the prompt by then, the last one has not."""
    trained = load_trained(str(checkpoint), "cpu")
    expected = chat_of(trained).ask("Say a row", silent, told).text
    chat = chat_of(trained)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trained.model.blocks[1], "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Say tokens", silent, told)
    assert chat.turns == []
    assert chat.ask("Say a row", silent, told).text == expected


def test_turns_are_not_drawn_alike(checkpoint: Path) -> None:
    trained = load_trained(str(checkpoint), "cpu")
    chat = chat_of(trained, sampling=Sampling(2.0), seed=3)
    first = chat.ask("what?", silent, told).text
    chat.reset()
    assert chat.ask("what?", silent, told).text != first
    again = chat_of(trained, sampling=Sampling(2.0), seed=3)
    assert again.ask("what?", silent, told).text == first


def test_the_context_is_of_all_turns(checkpoint: Path) -> None:
    trained = load_trained(str(checkpoint), "cpu")
    chat = chat_of(trained, max_new_tokens=4)
    long = "what? " * 60
    chat.ask(long, silent, told)
    warnings: list[str] = []
    chat.ask(long, silent, warnings.append)
    assert len(warnings) == 1
    assert warnings[0].startswith("the chat has ")
    assert "more than the model's context of 256" in warnings[0]
    chat.reset()
    chat.ask(long, silent, told)


def test_answers_that_reach_the_limit(checkpoint: Path, cli: Cli) -> None:
    done = cli("generate", checkpoint, "--prompt", "what?", "--max-new-tokens", 3)
    assert done.err.endswith("(stopped at --max-new-tokens 3)\n")
    assert done.out.endswith("\n")
    assert "stopped" not in done.out


def test_json(merged: Path, cli: Cli) -> None:
    ask = ("generate", merged, "--system", SYSTEM, "--prompt", "Say tokens")
    plain = cli(*ask)
    done = cli(*ask, "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert found.pop("seconds") > 0
    assert found.pop("tokens") > 1
    expected = {"prompt": "Say tokens", "answer": plain.out[:-1], "stopped": END_OF_TURN}
    assert found == expected
    short = cli(*ask, "--json", "--max-new-tokens", 1)
    assert (json.loads(short.out)["tokens"], json.loads(short.out)["stopped"]) == (1, LENGTH)


def test_a_system_message_changes_the_answer(checkpoint: Path, cli: Cli) -> None:
    ask = ("generate", checkpoint, "--prompt", "what?", "--max-new-tokens", 6)
    with_system = cli(*ask, "--system", "The model is a row.")
    assert with_system.status == 0, with_system.err
    assert with_system.out != cli(*ask).out


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REFUSES, "--system: the chat template refuses it: no system"),
        (LEAVES_OUT, "--system: the chat template leaves system messages out"),
        (None, "--system: the model has no chat template to put a message in"),
    ],
)
def test_a_system_message_that_the_model_does_not_take(
    template: str | None, message: str, with_template: Callable[..., Path], cli: Cli
) -> None:
    done = cli("generate", with_template(template), "--prompt", "a", "--system", "Be brief.")
    assert done.status == 2
    assert f"error: {message}\n  Leave it out, or " in done.err


def test_a_system_message_that_is_the_default(with_template: Callable[..., Path], cli: Cli) -> None:
    default = (
        "{% if messages[0]['role'] != 'system' %}Be brief.{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    path = with_template(default)
    ask = ("generate", path, "--prompt", "what?", "--max-new-tokens", 4)
    done = cli(*ask, "--system", "Be brief.")
    assert done.status == 0, done.err
    assert done.out == cli(*ask).out


def test_a_template_that_refuses_the_prompt(with_template: Callable[..., Path], cli: Cli) -> None:
    path = with_template("{{ raise_exception('never') }}")
    for more in ((), ("--system", "a")):
        done = cli("generate", path, "--prompt", "a", *more)
        assert done.status == 2
        assert "error: the chat template refuses it: never" in done.err


def test_nothing_to_continue(with_template: Callable[..., Path], cli: Cli) -> None:
    done = cli("generate", with_template(None), "--prompt", "")
    assert done.status == 2
    assert "error: the prompt is empty" in done.err
