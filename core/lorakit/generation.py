"""Answers from a model, one token at a time over a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lorakit.data.tokenizer import Tokenizer
from lorakit.modules.cache import KeyValueCache
from lorakit.modules.layout import Layout
from lorakit.protocols import CausalLM, Message


@torch.no_grad()
def generate_ids(
    model: CausalLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields the ids of an answer, without the stop id that ends it.

    Args:
        model: In evaluation mode.
        prompt: Ids of the prompt, at least one.
        max_new_tokens: Longest answer.
        stop_ids: Ids that end it.
        temperature: 0 takes the likeliest token; else the logits are divided by it and a token
            is drawn.
        generator: Of the draws, on the CPU.
    """
    # An adapter may have taken the head's place: it has no weight of its own.
    device = next(model.lm_head.parameters()).device
    cache = KeyValueCache()
    tokens = torch.tensor(list(prompt), device=device)
    for _ in range(max_new_tokens):
        layout = Layout.continued(cache.length, len(tokens), device)
        hidden = model.hidden(tokens, layout, cache)
        token = pick(model.logits(hidden[-1:])[0].float(), temperature, generator)
        if token in stop_ids:
            return
        yield token
        tokens = torch.tensor([token], device=device)


def pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """A token id from logits `[V]`."""
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.cpu() / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A user's message as the model saw such messages in training; as plain text where there
    is no chat template."""
    if tokenizer.template is None:
        return tokenizer.encode_text(prompt)
    text = tokenizer.render([Message("user", prompt)], add_generation_prompt=True)
    return list(tokenizer.encode_rendered(text).ids)


def stream_answer(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yields an answer's text piece by piece.

    A piece is held back while it ends in an unfinished character: its other bytes are in tokens
    still to come.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    shown = ""
    try:
        for token in generate_ids(
            model,  # type: ignore[arg-type]
            prompt_ids(tokenizer, prompt),
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            temperature=temperature,
            generator=generator,
        ):
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("�"):
                yield text[len(shown) :]
                shown = text
        rest = tokenizer.decode(ids)[len(shown) :] if ids else ""
        if rest:
            yield rest
    finally:
        model.train(was_training)


def answer(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, temperature: float
) -> str:
    """An answer as a whole."""
    pieces = stream_answer(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature
    )
    return "".join(pieces).strip()
