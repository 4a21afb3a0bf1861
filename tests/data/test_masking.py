"""Which tokens are trained: the assistant's own and the one that ends its turn, whatever the
chat template."""

from __future__ import annotations

import json

import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.catalog import load_catalog
from lorakit.data.chat_format import built_in
from lorakit.data.dataset import load_dataset
from lorakit.data.encode import encode_example
from lorakit.data.tokenizer import load_tokenizer
from lorakit.errors import UserError
from lorakit.progress import TerminalProgress
from lorakit.protocols import Conversation, Message, Text

SPECIAL = [
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
    "<|assistant|>", "<|end|>",
]  # fmt: skip
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Writes the end of text behind every conversation that it does not leave open: the turns before
# the last are then no prefix of the whole.
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
# Headers are plain text here.
ZEPHYR = (
    "{% for m in messages %}[[{{ m.role }}]]\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[[assistant]]\n{% endif %}"
)
# What stands before each answer, and what ends it.
TEMPLATES = {
    "chatml": (built_in("chatml"), "", "<|im_end|>"),
    "llama_2": (LLAMA_2, " ", " </s>"),
    "llama_3": (LLAMA_3, "", "<|eot_id|>"),
    "gemma": (GEMMA, "", "<end_of_turn>"),
    "phi_3": (PHI_3, "", "<|end|>"),
    "zephyr": (ZEPHYR, "", "</s>"),
    "alpaca": (built_in("alpaca"), "", "</s>"),
}
templates = pytest.mark.parametrize(
    ("template", "lead", "end"), TEMPLATES.values(), ids=TEMPLATES.keys()
)


@pytest.fixture(scope="module")
def plain(make_tokenizer, tmp_path_factory):
    """A tokenizer without a template."""
    directory = make_tokenizer(
        tmp_path_factory.mktemp("tokenizer"),
        SPECIAL,
        template=None,
        bos_token="<s>",
        eos_token="</s>",
    )
    return load_tokenizer({p.name: p.read_bytes() for p in directory.iterdir()}, "here")


def conversation(*contents):
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)))


def trained_text(example, tokenizer, **options):
    encoded = encode_example(example, tokenizer, **{"train_on_prompt": False, **options})
    ids = [i for i, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    return tokenizer.decode(ids, special=True)


@templates
@pytest.mark.parametrize(
    "contents",
    [
        ("Why?", "Because it is so."),
        ("Why?", "Because.", "And then?", "Nothing.\n\nNothing at all."),
        ("Say yes.", "yes", "Say yes.", "yes", "Say yes.", "Say yes."),
        ("a", "a", "user", "user", "assistant", "assistant"),
        ("x", "end", "e", "n", "s", "i", "model", "m"),
        ("1", "2", "2", "1", "1", "1"),
        ("Was?", "Grüße: 你好 🙂🙃", "?", "ok 🙂"),
        ("[INST] ### Response:", "user\nassistant\n### Instruction:", "\n", "[/INST]"),
        ("<think>", "if a < b: return |x|", "<", ">"),
    ],
)
def test_trained_is_the_answer_and_what_ends_it(template, lead, end, contents, plain):
    tokenizer = evolve(plain, template=template)
    found = trained_text(conversation(*contents), tokenizer)
    assert found == "".join(f"{lead}{text}{end}" for text in contents[1::2])


@templates
def test_tokens_are_those_of_the_rendered_text(template, lead, end, plain):
    tokenizer = evolve(plain, template=template)
    example = conversation("Why?", "Because.", "And then?", "Nothing.")
    encoded = encode_example(example, tokenizer, train_on_prompt=False)
    rendered = tokenizer.render(example.messages)
    assert tokenizer.decode(encoded.ids, special=True) == rendered
    assert list(encoded.ids) == tokenizer.backend.encode(rendered, add_special_tokens=False).ids


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Z")), min_size=1)
turns = st.lists(words.map(lambda text: text.strip() or "x"), min_size=2, max_size=6)


@pytest.mark.parametrize("name", ["chatml", "llama_3", "phi_3", "zephyr"])
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(turns)
def test_any_text_is_told_apart(name, plain, contents):
    contents = contents[: len(contents) // 2 * 2]
    template, lead, end = TEMPLATES[name]
    found = trained_text(conversation(*contents), evolve(plain, template=template))
    assert found == "".join(f"{lead}{text}{end}" for text in contents[1::2])


def test_system_turn_is_not_trained(plain):
    example = Conversation(
        (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello."))
    )
    for name in ("chatml", "llama_3", "zephyr", "alpaca"):
        template, _, end = TEMPLATES[name]
        assert trained_text(example, evolve(plain, template=template)) == f"Hello.{end}"


def test_turn_that_says_train_false_is_left_out(plain):
    example = Conversation(
        (
            Message("user", "One?"),
            Message("assistant", "Wrong.", trained=False),
            Message("user", "Two?"),
            Message("assistant", "Right.", trained=True),
        )
    )
    for template, lead, end in TEMPLATES.values():
        assert trained_text(example, evolve(plain, template=template)) == f"{lead}Right.{end}"


def test_empty_answer_trains_what_ends_it_alone(plain):
    tokenizer = evolve(plain, template=built_in("chatml"))
    example = conversation("Why?", "", "Well?", "So.")
    assert trained_text(example, tokenizer) == "<|im_end|>So.<|im_end|>"


def test_template_without_an_ending_token_trains_to_the_end_of_the_answer(plain):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    found = trained_text(conversation("Hi", "Yes.", "Why", "So."), evolve(plain, template=template))
    assert found == " Yes. So."


def test_token_that_joins_the_prompt_s_space_with_the_answer_is_trained(plain):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = evolve(plain, template=template)
    assert tokenizer.encode_rendered("assistant: because").tokens[-1] != "because"
    found = trained_text(conversation("which", "because", "what", "because"), tokenizer)
    assert found == " because</s> because</s>"


def test_turns_that_the_template_marks_as_generated(plain):
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    tokenizer = evolve(plain, template=template)
    assert trained_text(conversation("a", "a", "a", "b"), tokenizer) == "a</s>b</s>"
    said = (
        Message("user", "a"),
        Message("assistant", "a", trained=False),
        Message("user", "a"),
        Message("assistant", "b"),
    )
    assert trained_text(Conversation(said), tokenizer) == "b</s>"


def test_template_that_drops_reasoning_from_earlier_turns(plain):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = evolve(plain, template=template)
    found = trained_text(conversation("a", "b", "c", "<think>so</think>d"), tokenizer)
    assert found == "b<|im_end|><think>so</think>d<|im_end|>"
    found = trained_text(conversation("a", "<think>so</think>b", "c", "d"), tokenizer)
    assert found == "b<|im_end|>d<|im_end|>"


def test_template_that_leaves_a_turn_out_is_refused(plain):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    tokenizer = evolve(plain, template=template)
    with pytest.raises(ValueError, match="does not write an assistant's turn where"):
        trained_text(conversation("a", "b", "c", "d"), tokenizer)


def test_train_on_prompt_trains_everything(plain):
    tokenizer = evolve(plain, template=built_in("chatml"))
    example = conversation("Why?", "Because.")
    found = trained_text(example, tokenizer, train_on_prompt=True)
    assert found == tokenizer.render(example.messages)


@pytest.mark.parametrize("ends", [False, True])
def test_text_is_trained_whole_and_ends_in_one_eos(ends, plain):
    text = "Once upon a time." + ("</s>" if ends else "")
    assert trained_text(Text(text), plain) == "Once upon a time.</s>"


@pytest.fixture
def load(plain, tmp_path):
    """`load(rows, name, **data options)` -> Dataset, through the chatml template."""
    catalog = load_catalog()

    def load(rows, name="messages", **options):
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        form = catalog.get("dataset", name)
        tokenizer = evolve(plain, template=built_in("chatml"))
        return load_dataset(
            form,
            form.options(path=str(file), **options),
            tokenizer,
            TerminalProgress(),
            catalog=catalog,
        )

    return load


def row(*contents, **last):
    turns = [{"role": m.role, "content": m.content} for m in conversation(*contents).messages]
    turns[-1].update(last)
    return {"messages": turns}


@pytest.mark.parametrize(
    "bad",
    [row("Why?"), row("Why?", "Because.", train=False)],
    ids=["no_assistant_turn", "none_to_train"],
)
def test_row_without_a_trained_token_is_named(bad, load):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: no token of this row is trained"):
        load([row("Hi", "Hello."), bad])


def test_row_the_template_refuses_is_named(plain, load):
    turns = [{"role": "system", "content": "x"}, *row("Hi", "Hello.")["messages"]]
    refusing = evolve(plain, template=GEMMA)
    with pytest.raises(ValueError, match="System role not supported"):
        refusing.render([Message(t["role"], t["content"]) for t in turns])
    bad = {"messages": [{"role": "asistant", "content": "x"}]}
    with pytest.raises(UserError, match=r"line 2: .*'asistant'.*did you mean 'assistant'"):
        load([row("Hi", "Hello."), bad])


LONG = row("Hi", "Because " * 40)


def test_long_row_is_cut_at_its_end_and_counted(load):
    dataset = load([row("Hi", "Hello."), LONG], max_seq_len=24)
    whole = load([LONG], max_seq_len=1000).examples[0]
    assert [len(e) for e in dataset.examples][1] == 24
    assert dataset.examples[1].ids == whole.ids[:24]
    assert dataset.examples[1].trained == whole.trained[:24]
    report = dataset.report
    assert (report.rows, report.truncated, report.dropped) == (2, 1, 0)
    assert report.tokens == sum(len(e) for e in dataset.examples)
    assert report.trained_tokens == sum(e.targets for e in dataset.examples)
    assert "1 rows cut to 24 tokens" in report.sentence(24)


def test_long_row_is_dropped_and_counted(load):
    dataset = load([LONG, row("Hi", "Hello."), LONG], max_seq_len=24, too_long="drop")
    assert (dataset.report.rows, dataset.report.dropped) == (3, 2)
    assert dataset.where[0].endswith("line 2")
    assert "2 rows over 24 tokens left out" in dataset.report.sentence(24)
    with pytest.raises(UserError, match="no row is left"):
        load([LONG], max_seq_len=24, too_long="drop")


def test_long_row_is_an_error_naming_it(load):
    with pytest.raises(UserError, match=r"line 2: \d+ tokens, but data\.max_seq_len is 24"):
        load([row("Hi", "Hello."), LONG], max_seq_len=24, too_long="error")


def test_row_cut_to_nothing_trained_is_named(load):
    with pytest.raises(UserError, match=r"line 1: no trained token is left"):
        load([row("Why " * 40, "Because.")], max_seq_len=24)


def test_row_cut_to_nothing_trained_is_left_out_and_counted(load):
    long_prompt = row("Why " * 40, "Because.")
    dataset = load([long_prompt, row("Hi", "Hello."), long_prompt], max_seq_len=24)
    report = dataset.report
    assert (report.rows, report.untrained, report.truncated) == (3, 2, 0)
    assert [place.rpartition(", ")[2] for place in dataset.where] == ["line 2"]
    assert "2 rows left out, of which no trained token remains" in report.sentence(24)
    with pytest.raises(UserError, match=r"line 1: no trained .*, and so with all 2 rows"):
        load([long_prompt, long_prompt], max_seq_len=24)
    with pytest.raises(UserError, match=r"line 1: \d+ tokens, but data\.max_seq_len is 24"):
        load([long_prompt, row("Hi", "Hello.")], max_seq_len=24, too_long="error")


def test_alpaca_row_is_an_exchange(load, plain):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
        {"instruction": "Greet.", "output": "Hi."},
    ]
    texts = [plain.decode(e.ids, special=True) for e in load(rows, "alpaca").examples]
    expected = [("Add.\n\n1 and 2", "3"), ("Greet.", "Hello."), ("Greet.", "Hi.")]
    tokenizer = evolve(plain, template=built_in("chatml"))
    assert texts == [tokenizer.render(conversation(*pair).messages) for pair in expected]
