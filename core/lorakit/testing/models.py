"""Conformance of model families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.generation import generate_ids
from lorakit.modules import KeyValueCache, Layout
from lorakit.records import ModelFamily
from lorakit.testing.checkpoints import meta_model, sample_model
from lorakit.testing.failure import ensure
from lorakit.testing.offers import check_offer
from lorakit.weights.stream import linear_names

TOLERANCE = 1e-4
"""Of states near 1 in fp32: summing in another order moves them by about 1e-6."""


def check_model_family(
    record: ModelFamily, config: Mapping[str, Any], path: str = "sample", seed: int = 0
) -> None:
    """Checks a family on a small model.

    Args:
        record: The family.
        config: A config.json of few and narrow layers, with which the model has well under a
            million parameters; at least two layers.
        path: The `model.path` its options get.
        seed: Of the weights.

    Raises:
        ConformanceError: Something does not hold.
    """
    check_offer(record)
    model_type = config.get("model_type")
    ensure(model_type in record.model_types, f"model_types lacks the sample's {model_type!r}")
    _check_meta(meta_model(record, config, path))
    _check_refusal(record, model_type, path)
    model = sample_model(record, config, seed)
    vocabulary = _check_shapes(model)
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (13,), generator=chance)
    _check_causal(model, tokens, vocabulary)
    _check_documents(model, tokens)
    _check_cache(model, tokens)
    _check_gradients(model, tokens)


def _check_meta(model: Any) -> None:
    ensure(isinstance(model, nn.Module), f"build returned {type(model).__name__}, not a module")
    for member in ("lm_head", "blocks", "hidden", "logits"):
        ensure(hasattr(model, member), f"the model has no `{member}`")
    ensure(isinstance(model.lm_head, nn.Linear), "lm_head is no nn.Linear")
    placed = [n for n, p in model.named_parameters() if p.device.type != "meta"]
    ensure(not placed, f"built on the meta device, yet has memory: {placed[:3]}")
    stored = set(model.state_dict()) - dict(model.named_parameters(remove_duplicate=False)).keys()
    ensure(not stored, f"buffers that no checkpoint fills: {sorted(stored)[:3]}")
    blocks = list(model.blocks)
    ensure(blocks, "blocks is empty")
    inside = {id(m) for m in model.modules()}
    ensure(all(id(b) in inside for b in blocks), "blocks holds modules the model does not have")
    ensure(len({id(b) for b in blocks}) == len(blocks), "a block stands in blocks twice")
    ensure(linear_names(model)[:-1], "the model has no linear layer but its head")
    unique: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = unique.setdefault(id(parameter), name)
        ensure(
            first == name or "lm_head.weight" in (first, name),
            f"{first} and {name} are one parameter; only the head may share one",
        )


def _check_refusal(record: ModelFamily, model_type: Any, path: str) -> None:
    """A config.json that says nothing is the user's error, not a KeyError."""
    try:
        meta_model(record, {"model_type": model_type}, path)
    except UserError:
        return
    except Exception as error:
        ensure(False, f"a config.json without dimensions raises {error!r}, not a UserError")
    ensure(False, "a config.json without dimensions builds a model")


@torch.no_grad()
def _hidden(model: Any, tokens: Tensor, lengths: list[int]) -> Tensor:
    states: Tensor = model.hidden(tokens, Layout.of_lengths(lengths))
    return states


def _check_shapes(model: Any) -> int:
    """Returns V."""
    vocabulary, dim = model.lm_head.weight.shape
    states = _hidden(model, torch.arange(5), [5])
    ensure(states.shape == (5, dim), f"hidden gives {list(states.shape)}, expected [5, {dim}]")
    ensure(bool(states.isfinite().all()), "hidden gives numbers that are not finite")
    logits = model.logits(states[-2:])
    shape = list(logits.shape)
    ensure(shape == [2, vocabulary], f"logits gives {shape}, expected [2, {vocabulary}]")
    # The loss multiplies by the head's weight itself where nothing but a soft-cap follows it.
    plain = torch.nn.functional.linear(states[-2:], model.lm_head.weight, model.lm_head.bias)
    cap = getattr(model, "logit_softcap", None)
    plain = cap * torch.tanh(plain / cap) if cap else plain
    declared = bool(getattr(model, "logits_are_transformed", False))
    ensure(
        declared or _close(plain, logits),
        "logits are not lm_head(hidden), or that capped by the model's logit_softcap, and it does "
        "not say logits_are_transformed",
    )
    return int(vocabulary)


def _check_causal(model: Any, tokens: Tensor, vocabulary: int) -> None:
    count = len(tokens)
    states = _hidden(model, tokens, [count])
    changed = tokens.clone()
    changed[-1] = (changed[-1] + 1) % vocabulary
    after = _hidden(model, changed, [count])
    ensure(_close(states[:-1], after[:-1]), "a token's state depends on one that comes later")
    changed = tokens.clone()
    changed[0] = (changed[0] + 1) % vocabulary
    after = _hidden(model, changed, [count])
    ensure(not _close(states[-1], after[-1]), "a token's state does not depend on earlier ones")


@torch.no_grad()
def _check_documents(model: Any, tokens: Tensor) -> None:
    lengths = [6, 1, len(tokens) - 7]
    together = _hidden(model, tokens, lengths)
    apart = [_hidden(model, part, [len(part)]) for part in tokens.split(lengths)]
    ensure(
        _close(together, torch.cat(apart)),
        "documents of one micro-batch see each other: hidden of all differs from each alone",
    )
    if not getattr(model, "shares_prefixes", False):
        return
    # One document, and another that begins with four of its tokens.
    first, second = tokens, torch.cat([tokens[:4], tokens[5:]])
    layout = Layout.of_segments(
        [(slice(0, len(first)),), (slice(0, 4), slice(len(first), len(first) + len(second) - 4))]
    )
    shared: Tensor = model.hidden(torch.cat([first, second[4:]]), layout)
    apart = [_hidden(model, part, [len(part)]) for part in (first, second)]
    ensure(
        _close(shared, torch.cat([apart[0], apart[1][4:]])),
        "it says shares_prefixes, but hidden differs where two documents share tokens",
    )


@torch.no_grad()
def _check_cache(model: Any, tokens: Tensor) -> None:
    whole = _hidden(model, tokens, [len(tokens)])
    cache, parts = KeyValueCache(), []
    for part in tokens.split([5, 3, *[1] * (len(tokens) - 8)]):
        parts.append(model.hidden(part, Layout.continued(cache.length, len(part)), cache))
    ensure(
        cache.length == len(tokens),
        f"{len(tokens)} tokens have passed, but the cache counts {cache.length}",
    )
    ensure(_close(whole, torch.cat(parts)), "states over a cache differ from those without")
    prompt = tokens[:4].tolist()
    cached = list(generate_ids(model, prompt, max_new_tokens=8, stop_ids=frozenset()))
    plain = list(prompt)
    for _ in cached:
        ids = torch.tensor(plain)
        plain.append(int(model.logits(_hidden(model, ids, [len(plain)])[-1:]).argmax()))
    ensure(cached == plain[4:], "greedy generation over a cache differs from that without")


def _check_gradients(model: Any, tokens: Tensor) -> None:
    """Every block passes the loss on to a layer that an adapter could sit on."""
    linears = {n: model.get_submodule(n) for n in linear_names(model)[:-1]}
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    model.hidden(tokens, Layout.of_lengths([len(tokens)])).square().sum().backward()
    for number, block in enumerate(model.blocks):
        inside = {id(m) for m in block.modules()}
        moved = [
            linear.weight.grad is not None and bool(linear.weight.grad.any())
            for linear in linears.values()
            if id(linear) in inside
        ]
        ensure(any(moved), f"no linear layer of block {number} gets a gradient")


def _close(a: Tensor, b: Tensor) -> bool:
    scale = max(1.0, float(a.abs().max()))
    return bool(torch.allclose(a, b, atol=TOLERANCE * scale, rtol=0.0))
