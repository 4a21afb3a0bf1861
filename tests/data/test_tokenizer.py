"""Tokenizers from every kind of file: the original's ids, BOS once, EOS and padding apart."""

from __future__ import annotations

import base64
import json
import random

import pytest
import sentencepiece
from attrs import evolve
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from lorakit.data.chat_format import built_in
from lorakit.data.encode import encode_example
from lorakit.data.tokenizer import load_tokenizer
from lorakit.errors import UserError
from lorakit.generation import prompt_ids
from lorakit.protocols import Conversation, Message, Text

SYLLABLES = ["the", "ca", "t", "on", "ma", "an", "ing", "er", "b", "st", "lou", "dly", "12", "é"]
WORDS = ["".join(random.Random(i).choices(SYLLABLES, k=1 + i % 4)) for i in range(150)]
DEFINED = ["<tool>", "[REF]", "\n\n", "<x", "<x>"]


@pytest.fixture(scope="module")
def train_model(tmp_path_factory):
    """`train_model(**settings)` -> the file's content of a small SentencePiece model."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    dice = random.Random(0)
    lines = [" ".join(dice.choices(WORDS, k=8)) for _ in range(300)]
    (directory / "text").write_text("\n".join(lines))

    def train(**settings):
        given = {
            "model_type": "bpe",
            "vocab_size": 600,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "user_defined_symbols": DEFINED,
            "control_symbols": ["[INST]", "[/INST]"],
            **settings,
        }
        prefix = str(directory / "model")
        sentencepiece.SentencePieceTrainer.train(
            input=str(directory / "text"), model_prefix=prefix, minloglevel=2, **given
        )
        return (directory / "model.model").read_bytes()

    return train


def texts():
    dice = random.Random(1)
    yield from ["the cat", " the cat", "  two", "", " ", "a\n\nb", "naïve 北京 🙂", "rats  in 12 "]
    yield from [
        "<tool>",
        "the<tool>cat",
        " <tool> the",
        "<x><x the",
        "on[REF]\n\n\nma",
        "\uff21 \ufb01",  # NFKC changes both.
    ]
    for _ in range(200):
        yield "".join(dice.choices("theca ton12\n é", k=30))
        yield "".join(dice.choices([*WORDS[:9], " ", "  ", *DEFINED], k=9))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["<tool>"]},
        {"byte_fallback": False, "vocab_size": 540},
    ],
    ids=lambda s: next(iter(s), "llama"),
)
def test_ids_are_sentencepieces(settings, train_model):
    content = train_model(**settings)
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = load_tokenizer({"tokenizer.model": content}, "here")
    for text in texts():
        assert tokenizer.encode_rendered(text).ids == original.encode(text), repr(text)
    assert tokenizer.special_tokens["bos_token"] == "<s>"
    assert tokenizer.encode_text("the cat") == [1, *original.encode("the cat")]


def test_runs_of_one_rank_grow_from_the_left(write_model):
    """As in Mistral 7B's file, where all runs of spaces have the same score."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [("▁" * run, -1e9, 1) for run in (2, 4, 8, 3, 5, 6, 7)]
    pieces += [("▁a", -1.0, 1), ("▁", -1e9, 1), ("a", -1e9, 1)]
    content = write_model(pieces)
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = load_tokenizer({"tokenizer.model": content}, "here")
    for run in range(40):
        text = " " * run + "a"
        assert tokenizer.encode_rendered(text).ids == original.encode(text), run


def test_control_pieces_are_special_and_texts_behind_them_stand_alone(train_model):
    content = train_model()
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = load_tokenizer({"tokenizer.model": content}, "here")
    ids = tokenizer.encode_rendered("<s>[INST]the cat[/INST]on ma</s>").ids
    mark = original.piece_to_id
    expected = [1, mark("[INST]"), *original.encode("the cat")]
    assert ids == [*expected, mark("[/INST]"), *original.encode("on ma"), 2]


def test_added_tokens_keep_their_ids(train_model):
    files = {
        "tokenizer.model": train_model(),
        "added_tokens.json": json.dumps({"<|end|>": 601, "<|user|>": 600}).encode(),
        "tokenizer_config.json": json.dumps(
            {
                "added_tokens_decoder": {
                    "602": {"content": "<plain>", "special": False, "normalized": False}
                },
                "eos_token": {"content": "<|end|>"},
                "add_bos_token": False,
            }
        ).encode(),
    }
    tokenizer = load_tokenizer(files, "here")
    ids = tokenizer.encode_text("<|user|>the<plain>  cat<|end|>")
    assert (ids[0], ids[-1], 602 in ids) == (600, 601, True)
    assert tokenizer.token_id("eos_token") == 601
    assert tokenizer.is_special(601)
    assert not tokenizer.is_special(602)
    files["added_tokens.json"] = b'{"<|user|>": 600, "<|tool|>": 601, "<|end|>": 700}'
    with pytest.raises(UserError, match=r"'<\|end\|>' should have the id 700"):
        load_tokenizer(files, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a SentencePiece model nor a tiktoken file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "pointer to a large file"),
        (b"IQ== 0\nIg== 1\n", "a tiktoken file of 2 ranks; lorakit knows those of 128,000"),
        (b"IQ== 0\nIg==\n", "line 2: expected base64 and a rank"),
    ],
)
def test_files_that_are_no_tokenizer(content, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer({"tokenizer.model": content}, "here")


def test_kinds_that_are_refused(train_model, write_model):
    unigram = train_model(model_type="unigram", vocab_size=390)
    with pytest.raises(UserError, match=r"here/tokenizer\.model: .* of type unigram"):
        load_tokenizer({"tokenizer.model": unigram}, "here")
    with pytest.raises(UserError, match="neither a SentencePiece model"):
        load_tokenizer({"tokenizer.model": train_model()[:5000]}, "here")
    content = train_model(normalization_rule_name="nmt_nfkc")
    with pytest.raises(UserError, match="user-defined pieces that its normalizer would change"):
        load_tokenizer({"tokenizer.model": content}, "here")
    twice = [("<unk>", 0.0, 2), ("a", 0.0, 1), ("a", 0.0, 1)]
    with pytest.raises(UserError, match="the same piece twice"):
        load_tokenizer({"tokenizer.model": write_model(twice)}, "here")
    with pytest.raises(UserError, match=r"here: no tokenizer\.json, no tokenizer\.model"):
        load_tokenizer({}, "here")


@pytest.mark.parametrize(("ranks", "bos"), [(128_000, True), (151_643, False)])
def test_tiktoken_files_are_told_by_their_ranks(ranks, bos):
    """A made-up vocabulary of the right size; the real ones are in the golden tests."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"the", b" the"]
    tokens += [b"\xff" + n.to_bytes(3, "big") for n in range(ranks - len(tokens))]
    lines = (base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens))
    tokenizer = load_tokenizer({"tokenizer.model": b"\n".join(lines)}, "here")
    assert tokenizer.encode_text("the")[-1] == 257
    assert tokenizer.encode_text("a the")[-1] == 258
    assert bool(tokenizer.prefix) == bos
    assert tokenizer.token_id("eos_token") == (128_001 if bos else 151_643)
    if bos:
        ids = tokenizer.encode_rendered("<|start_header_id|><|eot_id|><|python_tag|>").ids
        assert ids == [128_006, 128_009, 128_010]
        assert tokenizer.vocabulary_size == 128_256


def test_transformers_loads_the_same(train_model, tmp_path):
    """What is written beside adapters and merged models, whatever the base came with."""
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 99}
    files = {"tokenizer.model": train_model(), "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = load_tokenizer(files, "here").with_template("llama2")
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        assert theirs(text)["input_ids"] == tokenizer.encode_text(text), repr(text)
    assert theirs.model_max_length == 99
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "on ma"}]
    ids = theirs.apply_chat_template(chat, return_dict=False)
    example = Conversation(tuple(Message(**turn) for turn in chat))
    assert ids == list(encode_example(example, tokenizer, train_on_prompt=False).ids)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (2, 0)
    saved = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert load_tokenizer(saved, "there").stop_ids == tokenizer.stop_ids


# ---------------------------------------------------------------- BOS, EOS, padding

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]


def byte_files(config, *, processor=None, special=SPECIAL, **more):
    """A tokenizer of a token a byte, as the files of a checkpoint."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if processor:
        backend.post_processor = processor
    values = {"tokenizer_config.json": config, **more}
    files = {name: json.dumps(value).encode() for name, value in values.items()}
    return {"tokenizer.json": backend.to_str().encode(), **files}


BOS_ONLY = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
BOS_AND_EOS = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
BOS_KINDS = {
    "post-processor": (NAMES, BOS_ONLY, True),
    "post-processor with eos": (NAMES, BOS_AND_EOS, True),
    "add_bos_token alone": (NAMES | {"add_bos_token": True}, None, True),
    "add_bos_token beside byte offsets": (
        NAMES | {"add_bos_token": True},
        processors.ByteLevel(trim_offsets=False),
        True,
    ),
    "both": (NAMES | {"add_bos_token": True}, BOS_ONLY, True),
    "neither": (NAMES, None, False),
    "no bos at all": ({"eos_token": "</s>", "bos_token": None}, None, False),
}


@pytest.mark.parametrize(("config", "processor", "adds"), BOS_KINDS.values(), ids=BOS_KINDS)
def test_bos_once(config, processor, adds):
    tokenizer = load_tokenizer(byte_files(config, processor=processor), "here")
    question = (Message("user", "Hi"),)
    answered = Conversation((*question, Message("assistant", "Yes.")))
    for text in ("Hi", "<s>Hi"):
        ids = encode_example(Text(text), tokenizer, train_on_prompt=False).ids
        assert ids.count(0) == (adds or text.startswith("<s>")), text
        assert (ids.count(1), ids[-1]) == (1, 1)
        assert prompt_ids(tokenizer, text) == list(ids[:-1])
    for name in ("alpaca", "chatml", "llama2"):
        chat = tokenizer.with_template(name)
        ids = encode_example(answered, chat, train_on_prompt=False).ids
        prompt = prompt_ids(chat, "Hi")
        assert (ids.count(0), prompt.count(0)) == (adds, adds), name
        assert prompt == list(ids[: len(prompt)])
    written = evolve(tokenizer, template="{{ bos_token }}{{ messages[0].content }}")
    ids = written.encode_rendered(written.render(question)).ids
    assert ids.count(0) == ("bos_token" in tokenizer.special_tokens)


def test_what_is_saved_puts_bos_where_it_is_in_training(tmp_path):
    files = byte_files(NAMES | {"add_bos_token": True})
    for name, content in load_tokenizer(files, "here").files.items():
        (tmp_path / name).write_bytes(content)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode("a").tokens == ["<s>", "a"]


def test_names_of_special_tokens_are_read_wherever_they_are():
    listed = {"bos_token": {"content": "<s>"}, "eos_token": "<unk>", "pad_token": "<unk>"}
    files = byte_files(
        {"eos_token": {"content": "</s>"}, "pad_token": None},
        **{"special_tokens_map.json": listed},
    )
    tokenizer = load_tokenizer(files, "here")
    assert tokenizer.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
    }
    files = byte_files({}, **{"generation_config.json": {"eos_token_id": [3, 1]}})
    tokenizer = load_tokenizer(files, "here")
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.stop_ids == {1, 3}


@pytest.mark.parametrize(
    ("special", "config", "expected"),
    [
        ([], {"pad_token": "<unk>"}, "<unk>"),
        (["<pad>"], {"pad_token": "</s>", "unk_token": "<unk>"}, "<pad>"),
        (["<|reserved_0|>"], {"pad_token": "<|im_end|>", "unk_token": "<unk>"}, "<unk>"),
        (["<|reserved_0|>"], {"unk_token": "</s>"}, "<|reserved_0|>"),
        ([], {}, None),
    ],
)
def test_padding_is_never_a_trained_token(special, config, expected, tmp_path):
    files = byte_files(NAMES | config, special=[*SPECIAL, *special])
    tokenizer = load_tokenizer(files, "here").with_template("chatml")
    assert tokenizer.special_tokens.get("pad_token") == expected
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token == expected
    assert theirs.pad_token_id not in tokenizer.stop_ids | {0, 1}


@pytest.mark.parametrize(
    ("name", "end"), [("chatml", "<|im_end|>"), ("alpaca", "</s>"), ("llama2", "</s>")]
)
def test_answers_stop_where_training_ended_them(name, end):
    files = byte_files(NAMES, **{"generation_config.json": {"eos_token_id": 4, "top_p": 0.9}})
    tokenizer = load_tokenizer(files, "here")
    assert tokenizer.stop_ids == {1, 4}
    chat = tokenizer.with_template(name)
    assert chat.stop_ids == {1, 4, chat.backend.token_to_id(end)}
    saved = json.loads(chat.files["generation_config.json"])
    assert saved == {"eos_token_id": sorted(chat.stop_ids), "top_p": 0.9}
    own = NAMES | {"chat_template": built_in(name)}
    assert load_tokenizer(byte_files(own), "here").stop_ids == chat.stop_ids - {4}
