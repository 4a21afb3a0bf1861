"""Answers from a model, one token at a time over a key-value cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from lorakit.data.tokenizer import Tokenizer
from lorakit.modules.cache import KeyValueCache
from lorakit.modules.layout import Layout
from lorakit.protocols import CausalLM, Message

_COLDEST = 1e-6
"""Below this, a temperature leaves the likeliest token alone, and the quotients would overflow."""


@frozen
class Sampling:
    """How a token is picked from logits.

    Attributes:
        temperature: 0 takes the likeliest token; else the logits are divided by it and a token
            is drawn.
        top_k: Only the `top_k` likeliest can be drawn (and what is as likely as the last of
            them); 0 sets no limit.
        top_p: Of those, only the likeliest whose probabilities together reach `top_p`, in (0, 1];
            at least one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling()


@torch.no_grad()
def generate_ids(
    model: CausalLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    cache: KeyValueCache | None = None,
) -> Iterator[int]:
    """Yields the ids of an answer, without the stop id that ends it: fewer than
    `max_new_tokens` if one did.

    Args:
        model: In evaluation mode.
        prompt: Ids of the prompt, at least one.
        max_new_tokens: Longest answer.
        stop_ids: Ids that end it.
        sampling: How a token is picked.
        generator: Of the draws, on the CPU.
        cache: Of tokens that the prompt starts with, fewer than it has; then of the answer's too.
    """
    # An adapter may have taken the head's place: it has no weight of its own.
    device = next(model.lm_head.parameters()).device
    cache = KeyValueCache() if cache is None else cache
    tokens = torch.tensor(list(prompt[cache.length :]), device=device)
    for _ in range(max_new_tokens):
        layout = Layout.continued(cache.length, len(tokens), device)
        hidden = model.hidden(tokens, layout, cache)
        token = pick(model.logits(hidden[-1:])[0].float(), sampling, generator)
        if token in stop_ids:
            return
        yield token
        tokens = torch.tensor([token], device=device)


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """A token id from logits `[V]`."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    logits = logits.cpu() / max(sampling.temperature, _COLDEST)
    logits = among_likeliest(logits, sampling.top_k, sampling.top_p)
    return int(torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator))


def among_likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits `[V]` with -inf for what cannot be drawn, see `Sampling`: what transformers'
    TopKLogitsWarper and, after it, TopPLogitsWarper make of them."""
    if 0 < top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort()
        left_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
        left_out[-1] = False
        logits = logits.masked_fill(left_out.scatter(0, order, left_out), -torch.inf)
    return logits


def prompt_ids(tokenizer: Tokenizer, prompt: str, earlier: Sequence[Message] = ()) -> list[int]:
    """A user's message as the model saw such messages in training; as plain text where there
    is no chat template.

    Args:
        tokenizer: Has the template.
        prompt: The message.
        earlier: What comes before it in the chat; left out where there is no chat template.

    Raises:
        ValueError: The template refuses these messages.
    """
    if tokenizer.template is None:
        return tokenizer.encode_text(prompt)
    text = tokenizer.render([*earlier, Message("user", prompt)], add_generation_prompt=True)
    return list(tokenizer.encode_rendered(text).ids)


def answer_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of an answer's ids piece by piece.

    A piece is held back while it ends in an unfinished character: its other bytes are in tokens
    still to come.
    """
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(seen)[len(shown) :] if seen else ""
    if rest:
        yield rest


def answer(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, temperature: float
) -> str:
    """An answer as a whole, whichever mode the model is in."""
    was_training = model.training
    model.eval()
    try:
        ids = generate_ids(
            model,  # type: ignore[arg-type]
            prompt_ids(tokenizer, prompt),
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            sampling=Sampling(temperature),
            generator=torch.Generator().manual_seed(0),
        )
        return "".join(answer_text(ids, tokenizer)).strip()
    finally:
        model.train(was_training)
