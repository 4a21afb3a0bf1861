"""Small random checkpoints: a family can be built, checked and trained without a download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from attrs import define, field
from torch import Tensor, nn

from lorakit.base_model import build_on_meta
from lorakit.data.chat_format import built_in
from lorakit.progress import SilentProgress
from lorakit.protocols import TensorSpec
from lorakit.records import ModelFamily
from lorakit.structuring import structure
from lorakit.testing.failure import ensure
from lorakit.weights.stream import check_tensors, stream_weights

SINGLE = "model.safetensors"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL)
"""What `write_checkpoint`'s tokenizer needs: every byte, and the special tokens."""


@define
class MemoryCheckpoint:
    """A `lorakit.protocols.BaseCheckpoint` that is nowhere on a disk.

    Attributes:
        config: As config.json would have it.
        contents: Tensor name -> tensor.
        path: For messages.
    """

    config: Mapping[str, Any]
    contents: Mapping[str, Tensor]
    path: Path = field(default=Path("sample"))

    def files(self) -> Mapping[str, bytes]:
        return {}

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        return {SINGLE: {n: TensorSpec(tuple(t.shape), "F32") for n, t in self.contents.items()}}

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        yield from self.contents.items()


def meta_model(family: ModelFamily, config: Mapping[str, Any], path: str = "sample") -> nn.Module:
    """The family's model on the meta device, with the options a recipe's `{name, path}` gives.

    Raises:
        ConformanceError: The family needs more than a path.
    """
    options, problems = structure(family.options, {"path": path}, "model")
    ensure(options is not None, f"{family.name}: needs more than a path: {'; '.join(problems)}")
    return build_on_meta(family, config, options)


def random_tensors(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A value for every parameter, tied ones once: matrices of the size trained ones have,
    vectors (norms, gates, biases) near 1, so that none hides what comes behind it."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        values[name] = noise / parameter.shape[-1] ** 0.5 if noise.dim() > 1 else 1 + 0.1 * noise
    return values


def sample_model(family: ModelFamily, config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """The family's model on the CPU in fp32 with random weights, streamed in as core does it."""
    model = meta_model(family, config)
    checkpoint = MemoryCheckpoint(config, random_tensors(model, seed))
    check_tensors(model, checkpoint)
    stream_weights(
        model,
        checkpoint,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=SilentProgress(),
    )
    return model.eval()


def write_checkpoint(
    family: ModelFamily | str, config: Mapping[str, Any], directory: str | Path, seed: int = 0
) -> Path:
    """Writes a random checkpoint that `lorakit train` takes: config.json, model.safetensors and
    a byte-level tokenizer with the ChatML template.

    Args:
        family: The record, or the name of an installed one.
        config: A small config.json; its `vocab_size` is at least `SMALLEST_VOCABULARY`.
        directory: Made if need be.
        seed: Of the weights.

    Returns:
        The directory.
    """
    from safetensors.torch import save_file

    if isinstance(family, str):
        from lorakit.catalog import load_catalog

        family = cast(ModelFamily, load_catalog().get("model family", family))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = meta_model(family, config)
    save_file(random_tensors(model, seed), directory / SINGLE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2), encoding="utf-8")
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json: one token a byte, ChatML's markers on top."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": built_in("chatml")}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
