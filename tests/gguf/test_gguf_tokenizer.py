"""Tokenizers rebuilt from a GGUF vocabulary, held against tokenizers and SentencePiece."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lorakit.errors import UserError
from lorakit_gguf.byte_level import CUTTINGS
from lorakit_gguf.checkpoint import GGUFCheckpoint
from lorakit_gguf.file import GGUFFile
from lorakit_gguf.tokenizer import build_tokenizer
from lorakit_gguf.vocabulary import Vocabulary


def rebuilt(path: Path) -> Tokenizer:
    vocabulary = Vocabulary.read(GGUFFile(path))
    assert vocabulary
    return build_tokenizer(vocabulary)


# ---------------------------------------------------------------- byte-level BPE


def test_files_of_the_tokenizer(tiny: Any, tmp_path: Path) -> None:
    files = GGUFCheckpoint.open(tiny.write(tmp_path / "m.gguf")).files()
    config = json.loads(files["tokenizer_config.json"])
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": tiny.fields()["tokenizer.chat_template"],
    }
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    vocabulary = tiny.fields()["tokenizer.ggml.tokens"]
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(vocabulary)}
    added = {i: (t.content, t.special) for i, t in tokenizer.get_added_tokens_decoder().items()}
    assert added == {
        0: ("<|endoftext|>", True),
        1: ("<|im_start|>", True),
        2: ("<|im_end|>", True),
        len(vocabulary) - 1: ("<tool>", False),
    }


def test_smollm_puts_every_digit_by_itself(tiny: Any, tmp_path: Path) -> None:
    tokenizer = rebuilt(tiny.write(tmp_path / "m.gguf"))
    text = "hello  12\n   7<|im_end|><tool>é"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == [
        "hello", "ĠĠ", "1", "2", "Ċ", "ĠĠ", "Ġ", "7", "<|im_end|>", "<tool>", "Ã", "©"
    ]  # fmt: skip
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == text.replace("<|im_end|>", "")


CASES = {
    "smollm": ("a  1234 b's", ["a", "ĠĠ", "1", "2", "3", "4", "Ġb", "'s"]),
    "gpt-2": ("a  1234 b's", ["a", "Ġ", "Ġ1234", "Ġb", "'s"]),
    "llama-bpe": ("a  1234 B'S\n\n x", ["a", "Ġ", "Ġ", "123", "4", "ĠB", "'S", "ĊĊ", "Ġx"]),
    "qwen2": ("a  12 B'S\n\n x", ["a", "Ġ", "Ġ", "1", "2", "ĠB", "'S", "ĊĊ", "Ġx"]),
    "default": ("a+b 12345", ["a", "+", "b", "Ġ", "123", "45"]),
}


@pytest.mark.parametrize("name", CASES)
def test_how_text_is_cut(name: str) -> None:
    text, pieces = CASES[name]
    cut = CUTTINGS[name].pre_tokenizer().pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


def test_whole_words_and_composed_characters(tiny: Any, tmp_path: Path) -> None:
    vocabulary = tiny.fields()["tokenizer.ggml.tokens"]
    # A word without merges to build it up is found only where words are looked up whole.
    fields = {"tokenizer.ggml.tokens": [*vocabulary[:-1], "zzz"]}
    llama3 = {**fields, "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None}
    tokenizer = rebuilt(tiny.write(tmp_path / "llama3.gguf", fields=llama3))
    assert tokenizer.encode("zzz").tokens == ["<|im_start|>", "zzz"]  # llama-bpe adds bos
    qwen2 = {**fields, "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.token_type": None}
    tokenizer = rebuilt(tiny.write(tmp_path / "qwen2.gguf", fields=qwen2))
    assert tokenizer.encode("zzz").tokens == ["z", "z", "z"]
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids


def test_bos_and_eos(tiny: Any, tmp_path: Path) -> None:
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = rebuilt(tiny.write(tmp_path / "m.gguf", fields=both))
    assert tokenizer.encode("hello").tokens == ["<|im_start|>", "hello", "<|im_end|>"]
    assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["hello"]
    pair = ["<|im_start|>", "he", "<|im_end|>", "<|im_start|>", "ll", "<|im_end|>"]
    assert tokenizer.encode("he", "ll").tokens == pair


def test_every_end_of_an_answer(tiny: Any, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", fields={"tokenizer.ggml.eot_token_id": 0})
    generation = json.loads(GGUFCheckpoint.open(path).files()["generation_config.json"])
    assert generation["eos_token_id"] == [0, 2]


def test_a_token_id_that_means_none(tiny: Any, tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.padding_token_id": 0xFFFFFFFF}
    checkpoint = GGUFCheckpoint.open(tiny.write(tmp_path / "m.gguf", fields=fields))
    assert checkpoint.config["pad_token_id"] is None
    assert "pad_token" not in json.loads(checkpoint.files()["tokenizer_config.json"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer.ggml.pre": "smolm"}, r"'smolm', which is not known here \(did you mean 'smol"),
        ({"tokenizer.ggml.pre": None}, "does not say how its tokenizer cuts text"),
        ({"tokenizer.ggml.model": "t5"}, "model 't5'; supported: gpt2, llama"),
        ({"tokenizer.ggml.merges": ["h ë"]}, "merge 'h ë' is not of tokens it has"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "267 tokens, but 2 token types"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "the same token twice"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "should be a list of strings"),
        ({"tokenizer.ggml.add_bos_token": 1}, "should be of type bool"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(
    tiny: Any, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "m.gguf", fields=fields)
    with pytest.raises(UserError, match=message) as error:
        GGUFCheckpoint.open(path).files()
    assert str(path) in error.value.message


def test_transformers_takes_the_tokenizer_as_it_is(
    tiny: Any, progress: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from lorakit_gguf.convert import write_directory

    (directory := tmp_path / "converted").mkdir()
    write_directory(GGUFCheckpoint.open(tiny.write(tmp_path / "m.gguf")), directory, progress)
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in ("hello  12\n   7<|im_end|>", "  é 34", "x<tool>"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
        assert theirs.decode(ours.encode(text).ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    chat = theirs.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<|im_start|>user\nhe<|im_end|>\n"


# ---------------------------------------------------------------- SentencePiece

SYLLABLES = ["the", "ca", "t", "on", "ma", "an", "ing", "er", "b", "st", "lou", "dly", "12", "é"]
WORDS = ["".join(random.Random(i).choices(SYLLABLES, k=1 + i % 4)) for i in range(150)]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small SentencePiece BPE with the settings of Llama 2's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("sentencepiece")
    dice = random.Random(0)
    lines = [" ".join(dice.choices(WORDS, k=8)) for _ in range(300)]
    (directory / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "m"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "m.model"))


def sentencepiece_fields(model: Any, **more: Any) -> dict[str, Any]:
    ids = range(len(model))
    kinds = [
        2 if model.IsUnknown(i) else 3 if model.IsControl(i) else 6 if model.IsByte(i) else 1
        for i in ids
    ]
    kinds[model.PieceToId("<tool>")] = 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.IdToPiece(i) for i in ids],
        "tokenizer.ggml.scores": [float(model.GetScore(i)) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def test_sentencepiece_ids_are_sentencepieces(
    sentencepiece_model: Any, make_gguf: Any, tmp_path: Path
) -> None:
    path = make_gguf(tmp_path / "m.gguf", sentencepiece_fields(sentencepiece_model), {})
    tokenizer = rebuilt(path)
    dice = random.Random(1)
    texts = ["the cat", " the cat", "  two", "", " ", "a\n\nb", "naïve 北京 🙂", "rats  in   1999 "]
    texts += ["".join(dice.choices("theca ton12\n é", k=30)) for _ in range(300)]
    texts += [" ".join(dice.choices(WORDS, k=9)) for _ in range(50)]
    for text in texts:
        expected = sentencepiece_model.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text
        assert tokenizer.encode(text).ids == [1, *expected], text  # bos, unless the file says no
        assert tokenizer.decode(expected) == text


def test_sentencepiece_special_tokens_and_prefix(
    sentencepiece_model: Any, make_gguf: Any, tmp_path: Path
) -> None:
    fields = sentencepiece_fields(sentencepiece_model, add_bos_token=False, add_space_prefix=False)
    tokenizer = rebuilt(make_gguf(tmp_path / "m.gguf", fields, {}))
    assert tokenizer.encode("the cat").tokens[0] != "▁the"
    assert tokenizer.decode(tokenizer.encode(" the cat").ids) == " the cat"
    encoded = tokenizer.encode("<s>cat</s><tool>")
    assert (encoded.tokens[0], encoded.tokens[-2:]) == ("<s>", ["</s>", "<tool>"])
    assert (encoded.ids[0], encoded.ids[-2]) == (1, 2)


def test_sentencepiece_without_scores(
    sentencepiece_model: Any, make_gguf: Any, tmp_path: Path
) -> None:
    fields = sentencepiece_fields(sentencepiece_model, scores=None)
    with pytest.raises(UserError, match="neither scores nor merges"):
        rebuilt(make_gguf(tmp_path / "m.gguf", fields, {}))
