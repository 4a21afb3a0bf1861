"""Which tokens are trained, through published templates: those that strip, that drop reasoning from
earlier turns, that have a default system prompt, that close the whole conversation."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lorakit.data.encode import encode_example
from lorakit.data.tokenizer import load_tokenizer
from lorakit.protocols import Conversation, Message

pytestmark = pytest.mark.download

# What ends an answer, and what is trained of an earlier and of the last turn that reason.
KEPT = "<think>\nso\n</think>\n\nYes."
CASES = {
    "Qwen-Qwen2.5-7B-Instruct": ("<|im_end|>", KEPT, KEPT),
    "Qwen-QwQ-32B": ("<|im_end|>", "Yes.", KEPT),
    "Qwen-Qwen3-0.6B": ("<|im_end|>", "Yes.", KEPT),
    "HuggingFaceTB-SmolLM3-3B": ("<|im_end|>", KEPT, KEPT),
    "LFM2.5-Instruct": ("<|im_end|>", "Yes.", KEPT),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|eot_id|>", KEPT, KEPT),
    "meta-llama-Llama-3.2-3B-Instruct": ("<|eot_id|>", KEPT, KEPT),
    "google-gemma-2-2b-it": ("<end_of_turn>", KEPT, KEPT),
    "microsoft-Phi-3.5-mini-instruct": ("<|end|>", KEPT, KEPT),
    "mistralai-Mistral-Nemo-Instruct-2407": ("</s>", KEPT, KEPT),
    "ibm-granite-granite-4.0": ("<|end_of_text|>", KEPT, KEPT),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        "\n\nYes.",
        "\n\nYes.",
    ),
    "NVIDIA-Nemotron-Nano-v2": ("\n<SPECIAL_12>", "Yes.", KEPT),
    "MiniMax-M1": ("<end_of_sentence>", KEPT, KEPT),
    # Marks itself what is generated, and counts the newline behind the end.
    "LFM2.5-8B-A1B": ("<|im_end|>\n", "Yes.", KEPT),
}


def tokenizer_for(template):
    """A token a byte, and one for each marker in the template."""
    markers = re.findall(r"<[|｜]?[\w▁]+[|｜]?>|\[/?[A-Z_]+\]", template)  # noqa: RUF001
    markers = [m for m in markers if "think" not in m and "tool" not in m]
    special = list(dict.fromkeys(["<s>", "</s>", *markers]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in special])
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    return load_tokenizer(files, "here")


def trained_text(tokenizer, *contents):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(contents))
    encoded = encode_example(Conversation(messages), tokenizer, train_on_prompt=False)
    ids = [i for i, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    return tokenizer.decode(ids, special=True)


@pytest.mark.parametrize(("name", "expected"), CASES.items(), ids=CASES)
def test_answers_and_their_ends(name, expected, llama_cpp):
    end, earlier, last = expected
    template = (llama_cpp / "templates" / f"{name}.jinja").read_text()
    tokenizer = tokenizer_for(template)
    assert tokenizer.backend.token_to_id(end.strip()) in tokenizer.stop_ids | {None}
    said = trained_text(tokenizer, "Why?", "Because.", "And?", KEPT)
    assert said == f"Because.{end}{last}{end}"
    said = trained_text(tokenizer, "Say yes.", KEPT, "Say yes.", "Say yes.")
    without_reasoning = "<think>\n\n</think>\n\n" if name == "Qwen-Qwen3-0.6B" else ""
    assert said == f"{earlier}{end}{without_reasoning}Say yes.{end}"


def test_every_template_that_renders_chats_is_masked(llama_cpp):
    refused = []
    for path in sorted((llama_cpp / "templates").glob("*.jinja")):
        tokenizer = tokenizer_for(path.read_text())
        try:
            said = trained_text(tokenizer, "Why?", "Because.", "And?", "Nothing.")
        except ValueError as error:
            refused.append(f"{path.name}: {error}")
            continue
        assert "Because." in said
        assert "Nothing." in said
        assert "Why" not in said
        assert "And" not in said
    assert len(refused) == 4, refused  # They cannot do without tools.
