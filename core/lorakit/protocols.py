"""What the objects behind the records look like: protocols and plain values, torch-free.

Shapes: B rows, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from attrs import field, frozen

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lorakit.modules.cache import KeyValueCache
    from lorakit.modules.layout import Layout
    from lorakit.recipes import Recipe


# ---------------------------------------------------------------- models


class CausalLM(Protocol):
    """A decoder that gives hidden states and its head apart.

    The loss projects only trained tokens, so the two are never composed here.  A family's
    model is an `nn.Module` with these members; `lorakit.modules.decoder.CausalDecoder` is one.

    Where logits are more than the head's product, the model says so by one of two attributes
    that others leave out: `logit_softcap: float | None`, for cap * tanh(z / cap), or
    `logits_are_transformed = True`, for anything else, at the price of a slower loss.

    By `shares_prefixes = True` a model says that it takes layouts whose documents share tokens:
    that its tokens meet only in `lorakit.modules.attention.document_attention`, and a hidden state
    depends on no later token.
    """

    lm_head: nn.Linear
    """The output projection `[V, D]`; shares the embedding's parameter if they are tied."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated layers, in order: the units of activation checkpointing and compilation."""
        ...

    def hidden(self, tokens: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """tokens `[T]` (documents one after the other, as `layout` says) -> states `[T, D]`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """states `[N, D]` -> logits `[N, V]`: the head and whatever follows it."""
        ...


# ---------------------------------------------------------------- adapters


@frozen
class Serving:
    """Whether vLLM serves an adapter beside its base model, without merging.

    Attributes:
        flags: What its command line needs, beyond `--enable-lora`.
        refused: Why it does not, a sentence each; empty if it does.
    """

    flags: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


# ---------------------------------------------------------------- base checkpoints


@frozen
class TensorSpec:
    """A stored tensor's shape and dtype name as the file gives it (`F32`, `BF16`, `Q4_1`)."""

    shape: tuple[int, ...]
    dtype: str


class BaseCheckpoint(Protocol):
    """An opened base model: its configuration, its tensors, and the files that go with it.

    Where a tensor costs more than to map its bytes (it is dequantized, or joined of parts), a
    format may offer `named_tensors(names)` beside `tensors`: those of these names only, in any
    order.  Without it, others are read and passed over.
    """

    @property
    def path(self) -> Path:
        """The directory or file, for messages and for the files beside the weights."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The contents of config.json."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """The tokenizer's and other small files by their Hugging Face names (tokenizer.json,
        tokenizer_config.json, chat_template.jinja, generation_config.json ...), without
        config.json and weights."""
        ...

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        """Shard file name -> tensor name -> spec, from headers alone; a single-file format
        names one shard, `model.safetensors`."""
        ...

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors (of one shard) under Hugging Face names, one at a time, on the CPU.
        Each may lie in a memory map of the file, whose pages are dropped when the next one is
        asked for: it can be read later, as long as the file stays, but what was written to it is
        lost.  Copy what is to be kept."""
        ...


class Progress(Protocol):
    """Shows that something long is under way: a bar on a terminal, plain lines elsewhere."""

    def task(
        self, description: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[ProgressTask]:
        """A task of `total` units (`bytes` are shown as MB); None where that is unknown."""
        ...


class ProgressTask(Protocol):
    def advance(self, amount: int = 1) -> None: ...


# ---------------------------------------------------------------- data


@frozen
class Message:
    """One turn.  `role` is `system`, `user`, `assistant` or `tool`.  `trained` None leaves it
    to the role: the assistant's turns are trained.  `extra` is what else the chat template is to
    see of the turn (`name`, `reasoning_content`, `tool_calls` ...)."""

    role: str
    content: str
    trained: bool | None = None
    extra: Mapping[str, Any] = field(factory=dict)


@frozen
class Conversation:
    """Messages to be rendered by a chat template."""

    messages: tuple[Message, ...]


@frozen
class Text:
    """Plain text: every token is trained, and an end-of-text token is added."""

    text: str


Example: TypeAlias = Conversation | Text


# ---------------------------------------------------------------- numbers


class Precision(Protocol):
    """A run's dtypes on its device.

    storage: frozen base weights as kept in memory; None keeps each as the checkpoint stores it.
    compute: activations and matrix products.
    adapter: trained parameters and, through them, gradients and optimizer state.
    notice: what the user should know (a fallback; why a step was skipped), or None.
    """

    compute: torch.dtype
    adapter: torch.dtype
    notice: str | None

    @property
    def storage(self) -> torch.dtype | None: ...

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of `loss`, scaled if the dtype needs it."""
        ...

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> float | None:
        """Unscales, clips to `max_norm` (0: never), steps; returns the norm before clipping, or
        None if it left the parameters alone because the scale was too large."""
        ...

    def state(self) -> dict[str, Any]:
        """What resuming needs (a loss scale); JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


# ---------------------------------------------------------------- snapshots


@frozen
class Snapshot:
    """A run at one optimizer step.

    Attributes:
        step: Optimizer steps done.
        adapter: The adapter's tensors under PEFT's keys.
        adapter_config: The contents of adapter_config.json.
        tensors: Everything else that is a tensor: optimizer state, generator states.
        state: Everything else: the loop's state, JSON values.
        kept_steps: Steps whose snapshots stay when this one is saved, however old they are.  Not
            a part of what is loaded again.
    """

    step: int
    adapter: Mapping[str, Tensor]
    adapter_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(factory=dict)
    state: Mapping[str, Any] = field(factory=dict)
    kept_steps: tuple[int, ...] = ()


class SnapshotStore(Protocol):
    """Where a run's snapshots are kept."""

    def save(self, snapshot: Snapshot) -> Path:
        """Writes it completely or not at all, then drops old ones as the options say, but
        those of `snapshot.kept_steps`."""
        ...

    def steps(self) -> list[int]:
        """The steps of all complete snapshots, ascending."""
        ...

    def load(self, step: int) -> Snapshot:
        """Raises `UserError` if it cannot be read."""
        ...


# ---------------------------------------------------------------- logs


@frozen
class RunInfo:
    """What a logger may want to know before the first step."""

    name: str
    output: Path
    recipe: Recipe
    first_step: int
    total_steps: int
    trainable_parameters: int
    parameters: int


class Logger(Protocol):
    """A sink for metrics.  One that raises is warned about once and then left out; it never
    stops a run."""

    def start(self, run: RunInfo) -> None: ...

    def metrics(self, values: Mapping[str, float]) -> None:
        """One optimizer step's (or evaluation's) numbers; keys as in metrics.jsonl."""
        ...

    def notice(self, text: str) -> None:
        """Something a person should read."""
        ...

    def finish(self) -> None: ...
