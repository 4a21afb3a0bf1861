"""The benchmark's runs, part by part, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any

from attrs import frozen

from lorakit.runtime import prefers_onednn
from tests.bench.inputs import Inputs
from tests.bench.targets import CANDIDATE, LONG, QLORA, chosen
from tests.bench.trained import (
    Setting,
    matmul_limit,
    packed,
    startup_seconds,
    train_in_turn,
    train_lorakit,
    train_peer,
)

Found = dict[str, Any]


@frozen
class Variant:
    """A run: its name, and what makes it."""

    name: str
    make: Callable[[], Found]


CANDIDATES = {
    f"{CANDIDATE}packed 512": packed(512),
    f"{CANDIDATE}packed 4 x 512, one row at a time": packed(512).but(
        training={"gradient_accumulation_steps": 4}
    ),
    **{
        f"{CANDIDATE}packed {tokens:,}{label}": packed(tokens, checkpointing)
        for tokens in (1024, 2048)
        for checkpointing, label in (
            (False, ""),
            ("selective", ", checkpointing selective"),
            (True, ", checkpointing on"),
        )
    },
}
CANDIDATES[f"{CANDIDATE}packed 1,536"] = packed(1536)
CANDIDATES[f"{CANDIDATE}packed 1,024, products by torch"] = packed(1024).but(
    training={"kernels": "torch"}
)
DEFAULT = f"{CANDIDATE}packed 2,048"
QUANTIZED = ("packed 512", "packed 1,024", "packed 1,536", "packed 2,048, checkpointing selective")
LENGTHS = (256, 512, 1024, 2048)
TURNS = (1, 2)
MEMORY_LENGTHS = (1024, 2048, 4096, 8192)
LIMIT_STEP, LIMIT_PRODUCTS = "limit: step", "limit: matrix products"
LONG_LIMITS = {4096: 2.4, 8192: 3.1}
"""GiB for a chat of so many tokens: under a third of what TRL takes."""
SHORT_DOCUMENT = 256
COMPILED = "compile on"
JOINED = "not packed (16 micro-batches of 1 document a step)"
NO_COMPILER_CACHE = "TORCHINDUCTOR_FORCE_DISABLE_CACHES"
BY_ONEDNN = ("onednn", "blockwise")
"""What there is to leave out only where oneDNN is the library of choice."""


def best(results: Mapping[str, Any]) -> Setting:
    return CANDIDATES.get(chosen(results) or DEFAULT, CANDIDATES[DEFAULT])


def against_peers(inputs: Inputs, steps: int, results: Mapping[str, Any]) -> Iterator[Variant]:
    rows = inputs.rows()

    def trl(*options: str) -> Callable[[], Found]:
        return lambda: train_peer(
            "trl_sft.py", inputs, steps=steps, options=["--rows", str(rows), *options]
        )

    packing = ["--packed", "--length", "512"]
    off = ["--checkpointing", "off"]
    peers = [
        Variant("TRL, padded batches of 4", trl()),
        Variant("TRL, padded batches of 4, checkpointing off", trl(*off)),
        Variant("TRL, packed 4 x 512", trl(*packing)),
        Variant("TRL, packed 4 x 512, checkpointing off", trl(*packing, *off)),
        Variant(
            "HF loop, padded batches of 4",
            lambda: train_peer("hf_loop.py", inputs, steps=steps, options=["--rows", str(rows)]),
        ),
    ]
    yield from peers
    for name, setting in CANDIDATES.items():
        yield Variant(name, lambda s=setting: train_lorakit(s, inputs, rows=rows, steps=steps))
    # Before and after: the machine's speed changes.
    yield from peers


def against_the_limit(inputs: Inputs, steps: int, results: Mapping[str, Any]) -> Iterator[Variant]:
    """A step without checkpointing, whose products are done once, and those products."""
    rows, setting = inputs.rows(), best(results).but(training={"activation_checkpointing": False})
    yield Variant(LIMIT_STEP, lambda: train_lorakit(setting, inputs, rows=rows, steps=steps))
    yield Variant(LIMIT_PRODUCTS, lambda: matmul_limit(setting, inputs, rows=rows, steps=steps))


def quantized(inputs: Inputs, steps: int, results: Mapping[str, Any]) -> Iterator[Variant]:
    rows = inputs.rows()
    options = ["--rows", str(rows), "--nf4"]
    peer = Variant(
        QLORA[0].peer, lambda: train_peer("trl_sft.py", inputs, steps=steps, options=options)
    )
    yield peer
    # A weight is dequantized once a micro-batch, however long that is.
    for name, setting in CANDIDATES.items():
        short, nf4 = name.removeprefix(CANDIDATE), setting.but(quantization="nf4")
        if short in QUANTIZED:
            yield Variant(
                f"{QLORA[0].ours}: {short}",
                lambda s=nf4: train_lorakit(s, inputs, rows=rows, steps=steps),
            )
    yield peer


def long_context(inputs: Inputs, steps: int, results: Mapping[str, Any]) -> Iterator[Variant]:
    """A short chat to warm up with, and one long one: minutes a step for the peer."""
    for length, target in LONG.items():
        rows, tokens = inputs.long_rows(length), inputs.long_tokens(length)
        options = ["--tokens", str(tokens), "--batch", "1", "--length", str(length)]
        yield Variant(
            target.peer,
            lambda o=options: train_peer("trl_sft.py", inputs, steps=2, options=o),
        )
        limit = LONG_LIMITS[length]
        for label, training in (
            ("checkpointing on", {"activation_checkpointing": True}),
            ("checkpointing selective", {"activation_checkpointing": "selective"}),
            (
                f"checkpointing auto within {limit} GiB",
                {"activation_checkpointing": "auto", "memory_limit": limit},
            ),
        ):
            setting = Setting(data={"max_seq_len": length}, training=training)
            yield Variant(
                f"{target.ours}, {label}",
                lambda s=setting, r=rows: train_lorakit(s, inputs, rows=r, steps=2),
            )


def ablation(inputs: Inputs, steps: int, results: Mapping[str, Any]) -> Iterator[Variant]:
    """One technique off at a time, from a setting in which all of them do something."""
    rows, base = inputs.rows(), CANDIDATES[DEFAULT]
    for name, setting in {
        "all on": base,
        "not packed (batches of 4 documents)": base.but(
            data={"packed": False, "max_seq_len": 1024},
            training={"batch_size": 4, "gradient_accumulation_steps": 1},
        ),
        "not packed (1 document a step)": base.but(
            data={"packed": False, "max_seq_len": 1024},
            training={"gradient_accumulation_steps": 1},
        ),
        JOINED: base.but(
            data={"packed": False, "max_seq_len": 1024},
            training={"gradient_accumulation_steps": 16},
        ),
        f"{JOINED}, each by itself": base.but(
            data={"packed": False, "max_seq_len": 1024},
            training={"gradient_accumulation_steps": 16, "join_micro_batches": False},
        ),
        "beginnings in common computed for each document": base.but(
            training={"share_prefixes": False}
        ),
        "torch's threads for each operation, none for documents": base.but(
            without="document-threads"
        ),
        "large tensors by malloc (no arena)": base.but(without="arena"),
        "blocks part by part (no call for half of one)": base.but(without="sublayers"),
        "plain autograd (fused = false)": base.but(training={"fused": False}),
        "whole logits (no chunked loss)": base.but(without="chunked-loss"),
        "every token projected": base.but(without="trained-only"),
        "torch's own attention call per document": base.but(without="flash-kernel"),
        "long documents by torch's kernel too": base.but(without="blockwise"),
        "products by torch's default library": base.but(without="onednn"),
        "products, gates and attention by torch (kernels)": base.but(training={"kernels": "torch"}),
        "base weights widened when loaded": base.but(precision={"storage": "fp32"}),
        "process settings off (LORAKIT_TUNE=0)": base.but(env={"LORAKIT_TUNE": "0"}),
        COMPILED: base.but(training={"compile": True}, env={NO_COMPILER_CACHE: "1"}),
        "checkpointing off": base.but(training={"activation_checkpointing": False}),
        "checkpointing selective": base.but(training={"activation_checkpointing": "selective"}),
        "checkpointing on": base.but(training={"activation_checkpointing": True}),
    }.items():
        if name != "all on" and setting == base:
            continue
        if setting.without in BY_ONEDNN and not prefers_onednn():
            continue
        yield Variant(
            f"ablation: {name}",
            lambda s=setting: train_lorakit(s, inputs, rows=rows, steps=steps),
        )


def row_time(tokens: int, turn: int, *, shared: bool = True) -> str:
    """The run whose micro-batches are of one row of so many tokens; what documents begin with in
    common computed once, or for each."""
    name = f"time: {tokens:,} tokens a row, turn {turn}"
    return name if shared else f"{name}, beginnings for each document"


def rows_together(tokens: int) -> str:
    """The run whose micro-batches hold as many rows as the longest of `LENGTHS` holds tokens."""
    return f"time: {LENGTHS[-1] // tokens} rows of {tokens:,} tokens"


def scaling(inputs: Inputs, steps: int, results: Mapping[str, Any]) -> Iterator[Variant]:
    rows, base = inputs.short_rows(SHORT_DOCUMENT), best(results)
    # In turn and twice, since a fifth is to be seen, and the machine may change as much meanwhile.
    for turn, tokens, shared in product(TURNS, LENGTHS, (True, False)):
        setting = base.but(
            data={"packed": True, "max_seq_len": tokens},
            training={"gradient_accumulation_steps": 1, "share_prefixes": shared},
        )
        # Short steps are many, so that each length is timed for about as long.
        count = 1 + (steps - 1) * min(4, max(LENGTHS) // tokens)
        yield Variant(
            row_time(tokens, turn, shared=shared),
            lambda s=setting, n=count: train_lorakit(s, inputs, rows=rows, steps=n),
        )
    for tokens in LENGTHS[:-1]:
        setting = base.but(
            data={"packed": True, "max_seq_len": tokens},
            training={"gradient_accumulation_steps": 1, "batch_size": LENGTHS[-1] // tokens},
        )
        yield Variant(
            rows_together(tokens),
            lambda s=setting: train_lorakit(s, inputs, rows=rows, steps=steps),
        )
    for tokens in MEMORY_LENGTHS:
        setting = packed(tokens, True)
        yield Variant(
            f"memory: {tokens:,} tokens a row",
            lambda s=setting: train_lorakit(s, inputs, rows=rows, steps=1),
        )


def dora(inputs: Inputs, steps: int, results: Mapping[str, Any]) -> Iterator[Variant]:
    """Step by step in turn, since a tenth is to be seen."""
    rows, base = inputs.rows(), best(results)
    both = [base.but(adapter={"dora": on}) for on in (False, True)]
    found = cache(lambda: train_in_turn(both, inputs, rows=rows, steps=steps))
    for index, name in enumerate(("LoRA", "DoRA")):
        yield Variant(f"adapter: {name}", lambda i=index: found()[i])


def startup(inputs: Inputs, steps: int, results: Mapping[str, Any]) -> Iterator[Variant]:
    """One document a step: it is over soon, and all before it is the same."""
    rows = inputs.rows()
    yield Variant(
        "start-up",
        lambda: {"seconds": [startup_seconds(Setting(), inputs, rows=rows) for _ in range(steps)]},
    )


PARTS: dict[str, Callable[[Inputs, int, Mapping[str, Any]], Iterator[Variant]]] = {
    "peers": against_peers,
    "limit": against_the_limit,
    "qlora": quantized,
    "long": long_context,
    "ablation": ablation,
    "scaling": scaling,
    "dora": dora,
    "startup": startup,
}
WITH_PEERS = ("peers", "qlora", "long")
