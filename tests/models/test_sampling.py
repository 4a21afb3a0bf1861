"""What can be drawn from logits, beside transformers' warpers; and that it is drawn as they say."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lorakit.generation import Sampling, among_likeliest, pick


def logits_of(seed: int, size: int = 300, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """As transformers' generate() orders them."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores[0]


@pytest.mark.parametrize("top_k", [0, 1, 2, 40, 300, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.1, 1e-9])
def test_what_can_be_drawn_is_what_transformers_warpers_leave(top_k: int, top_p: float):
    for seed in range(5):
        sampling = Sampling(0.7, top_k, top_p)
        logits = logits_of(seed)
        expected = warped(logits, sampling)
        found = among_likeliest(logits / 0.7, top_k, top_p)
        assert torch.equal(found, expected)
        if top_k == 1 or top_p == 1e-9:
            assert found.isfinite().sum() == 1
        drawn = torch.Generator().manual_seed(seed)
        reference = torch.Generator().manual_seed(seed)
        for _ in range(20):
            token = torch.multinomial(expected.softmax(-1), 1, generator=reference)
            assert pick(logits, sampling, drawn) == int(token)


def test_equally_likely_tokens():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    for sampling in (Sampling(1.0, 2), Sampling(1.0, 2, 0.5), Sampling(1.0, 0, 0.5)):
        found = among_likeliest(logits, sampling.top_k, sampling.top_p)
        assert torch.equal(found, warped(logits, sampling))


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-7])
def test_the_coldest_draws_take_the_likeliest(temperature: float):
    logits = logits_of(0, scale=30.0)
    generator = torch.Generator().manual_seed(0)
    assert pick(logits, Sampling(temperature, 5, 0.9), generator) == int(logits.argmax())
