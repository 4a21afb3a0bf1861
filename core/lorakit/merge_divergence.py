"""What merging costs an adapter that was trained over a quantized base.

The adapter learned beside weights that quantization had moved.  Folded into the original ones it
meets a base it has not seen; folded into the dequantized ones it meets the one it was trained
against, with quantization's error in it for good.  Here the model as trained and both merged
models see the same rows, and the mean of KL(trained || merged) over their trained tokens says how
far each is from what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from lorakit.adapter_origin import is_quantized
from lorakit.adapters import wrap_linear
from lorakit.base_model import quantizer
from lorakit.block_streaming import Loading, block_names, streamed
from lorakit.data.batches import IGNORED, Batch, make_batch
from lorakit.data.dataset import Dataset, load_dataset
from lorakit.data.encode import Encoded
from lorakit.errors import UserError
from lorakit.mergeable import Mergeable
from lorakit.merging import Merge, MergedCheckpoint
from lorakit.modules.frozen import release_buffers
from lorakit.protocols import BaseCheckpoint, CausalLM, Progress
from lorakit.recipes import read_section
from lorakit.runtime import tensors_in_own_pages
from lorakit.weights.dtypes import torch_dtype

ROWS = 8
TRAINED_TOKENS = 32
"""In a row: with all of them, 256 distributions over a vocabulary are kept, 131 MB at 128k."""
LENGTH = 512
"""Tokens in all rows together, unless one alone is longer: three models compute them, on a CPU
at a few thousand tokens a minute where the model has 7B parameters."""
COMPARED_AT_ONCE = 16
"""Distributions compared at a time, in fp64."""
COMPUTE = torch.float32
"""Whatever the run computed in: rounded to bf16, activations alone would make two equal models
diverge by more than a good merge does."""


@frozen
class Divergence:
    """Mean KL divergence from the trained model, in nats a token.

    Attributes:
        original: Of the adapter merged into the original weights.
        dequantized: Of the adapter merged into the dequantized base.
        tokens: Trained tokens it is the mean over.
        rows: Rows they are of.
    """

    original: float
    dequantized: float
    tokens: int
    rows: int

    def sentence(self) -> str:
        return (
            f"mean KL divergence from the trained model over {self.tokens} tokens of "
            f"{self.rows} rows: into the original weights {self.original:.2g} nats, "
            f"into the dequantized base {self.dequantized:.2g} nats"
        )


def divergence_sentence(opened: Mergeable, device: torch.device, progress: Progress) -> str | None:
    """What `lorakit merge` says of its two choices; None where the base was not quantized."""
    if not is_quantized(opened.adapter):
        return None
    try:
        return merge_divergence(
            opened, training_rows(opened, progress), device, progress
        ).sentence()
    except UserError as error:
        return f"mean KL divergence from the trained model: not known, as {error.message}"


def training_rows(opened: Mergeable, progress: Progress) -> Batch:
    """The first rows of the data that the adapter was trained on.

    Each ends with its 32nd trained token; the longest are left out while all are over 512 tokens.

    Raises:
        UserError: There is no recipe that says which data it was, or the data is not here.
    """
    table = opened.recipe().get("data")
    if table is None:
        raise UserError(
            f"{opened.adapter.path} is apart from its run, whose recipe.toml says which data it "
            "was trained on"
        )
    section = read_section("dataset", table, opened.catalog, str(opened.adapter.path))
    dataset = load_dataset(
        section.record, section.options, opened.tokenizer(), progress, first=ROWS
    )
    return make_batch(*_shortened(dataset))


def _shortened(dataset: Dataset) -> tuple[Dataset, range]:
    examples = [_cut(example) for example in dataset.examples]
    while len(examples) > 1 and sum(map(len, examples)) > LENGTH:
        examples.remove(max(examples, key=len))
    return evolve(dataset, examples=tuple(examples)), range(len(examples))


def _cut(example: Encoded) -> Encoded:
    """The example up to its last trained token that counts."""
    trained = [place for place in range(1, len(example)) if example.trained[place]]
    return example.truncated(trained[:TRAINED_TOKENS][-1] + 1)


@tensors_in_own_pages()
@torch.no_grad()
def merge_divergence(
    opened: Mergeable, batch: Batch, device: torch.device, progress: Progress
) -> Divergence:
    """Compares both merged models with the trained one, block by block: memory is that of one
    block and of what is outside the blocks, whatever the size of the model.

    Args:
        opened: Trained over a quantized base.
        batch: The rows.
        device: Where they are computed.
        progress: Counts blocks.

    Raises:
        UserError: The base was not quantized, or cannot be as it was.
    """
    batch = batch.to(device)
    base, adapter = opened.base.checkpoint, opened.adapter
    dequantized = opened.dequantized_base(device)
    model = opened.base.model
    blocks = 3 * len(opened.base.causal_lm.blocks)
    with progress.task("comparing merged models", blocks, "blocks") as task:

        def logits(checkpoint: BaseCheckpoint, loading: Loading) -> Tensor:
            return trained_logits(streamed(model, checkpoint, loading, task.advance), batch)

        trained = logits(base, _as_trained(opened, device))
        release_buffers()
        # Merged weights are in their files' dtypes, as whoever loads them next finds them.
        plain = Loading(device, None, COMPUTE)
        found = [
            mean_divergence(trained, logits(MergedCheckpoint(base, merge), plain))
            for merge in (
                Merge(adapter.method, adapter.options, adapter.tensors, base_weight)
                for base_weight in (None, dequantized)
            )
        ]
    return Divergence(found[0], found[1], batch.trained, len(batch.rows))


def _as_trained(opened: Mergeable, device: torch.device) -> Loading:
    assert opened.quantization is not None
    layers = opened.adapter.tensors
    in_a_block = tuple(f"{name}." for name in block_names(opened.base.model))

    def adapt(module: nn.Module, prefix: str) -> None:
        for layer, tensors in layers.items():
            inside = layer.startswith(prefix) if prefix else not layer.startswith(in_a_block)
            if inside:
                _wrap(module, layer.removeprefix(prefix), tensors, prefix)

    def _wrap(module: nn.Module, name: str, tensors: Mapping[str, Tensor], prefix: str) -> None:
        method, options = opened.adapter.method, opened.adapter.options
        wrapped = wrap_linear(module, name, method, options, COMPUTE, prefix=prefix)
        own = dict(wrapped.named_parameters())
        for suffix, tensor in tensors.items():
            own[suffix].copy_(tensor)

    return Loading(
        device,
        narrowest(opened.base.checkpoint, opened.storage(device)),
        COMPUTE,
        quantizer(opened.quantization, COMPUTE),
        adapt,
    )


def narrowest(checkpoint: BaseCheckpoint, storage: torch.dtype | None) -> torch.dtype | None:
    """The precision's storage dtype, or the checkpoint's own where that holds the same values in
    fewer bits."""
    if storage is None:
        return None
    names = {spec.dtype for specs in checkpoint.shards().values() for spec in specs.values()}
    found = torch_dtype(next(iter(names))) if len(names) == 1 else None
    return found if found is not None and found.itemsize < storage.itemsize else storage


def trained_logits(model: CausalLM, batch: Batch) -> Tensor:
    """Logits `[N, V]` where the next token is trained, in fp32 on the CPU."""
    hidden = model.hidden(batch.tokens, batch.layout)
    return model.logits(hidden[batch.labels != IGNORED]).float().cpu()


def mean_divergence(trained: Tensor, merged: Tensor) -> float:
    """The mean over tokens of KL(p || q) = sum_v p_v (log p_v - log q_v).

    Args:
        trained: Logits `[N, V]` of p.
        merged: Logits `[N, V]` of q.
    """
    total = 0.0
    pairs = zip(trained.split(COMPARED_AT_ONCE), merged.split(COMPARED_AT_ONCE), strict=True)
    for p, q in pairs:
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(trained)
