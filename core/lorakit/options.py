"""The recipe's own sections, and the base classes of plugins' option classes.

Options live with the code that reads them: a plugin's options are in the plugin.  Here are
only the keys that core reads itself.
"""

from __future__ import annotations

import re
from typing import Any

import attrs
from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, lt, optional

from lorakit.errors import did_you_mean, listing

LOCAL_PATH = {"local_path": True}
"""`field(default="", metadata=LOCAL_PATH)`: the option is a path of this machine, never a hub's.  A
run writes it down absolute, so that it is the same place from every directory."""

DEVICES = ("auto", "cpu", "mps", "cuda", "cuda:N")


def check_device(_: Any, __: Any, name: str) -> None:
    """A validator, of a device's name; whether the machine has it is not looked at.

    Raises:
        ValueError: No device is called so.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name):
        # difflib finds "cpu" nearest.
        hint = " (did you mean 'cuda'?)" if name == "gpu" else ""
        raise ValueError(f'"{name}" is none of {listing(DEVICES)}{hint}')


def not_empty(_: Any, __: Any, value: str) -> None:
    """A validator, of text that must say something.

    Raises:
        ValueError: It is empty.
    """
    if not value:
        raise ValueError('must not be empty: ""')


@frozen(kw_only=True)
class NoOptions:
    """A section with no key but `name`."""


@frozen(kw_only=True)
class ModelOptions:
    """`[model]`: the keys every model family has.

    Attributes:
        path: A directory, a file, or a path of another model source.
    """

    path: str = field(validator=not_empty)


@frozen(kw_only=True)
class OptimizerOptions:
    """`[optimizer]`: the keys every optimizer has.

    Attributes:
        lr: Peak learning rate; the schedule scales it.
    """

    lr: float = field(default=3e-4, validator=gt(0.0))


@frozen(kw_only=True)
class AdapterOptions:
    """`[adapter]`: the keys an adapter method has whose training can go on from a saved adapter.

    Attributes:
        path: A run or an adapter directory, lorakit's or PEFT's, with the same settings; its
            values are the start. Empty starts anew.
    """

    path: str = field(default="", metadata=LOCAL_PATH)


@frozen(kw_only=True)
class CheckpointerOptions:
    """`[checkpointer]`: the keys every checkpointer has.

    Attributes:
        every_steps: Save each time so many optimizer steps are done; 0 means only at the end
            of each epoch and of the run.
        keep_last: How many checkpoints to keep; 0 keeps all.
        save_merged: Write `merged/`, the base model with the adapter folded in, at the end.
        save_merged_each_epoch: Write it at the end of each epoch too (`merged-epoch-N/`).
    """

    every_steps: int = field(default=0, validator=ge(0))
    keep_last: int = field(default=2, validator=ge(0))
    save_merged: bool = True
    save_merged_each_epoch: bool = False


@frozen(kw_only=True)
class DataOptions:
    """`[data]`: the keys every data set format has.

    Attributes:
        path: A JSON, JSONL, CSV or Parquet file, a directory or glob of them, a data set on the
            hub (`owner/name`), or `lorakit:NAME` for a file that ships with lorakit.
        split: Which part of a data set on the hub; local files have none.
        files: A glob that picks files of a directory or of a data set on the hub, by their paths
            in it; in the place of `split`.
        max_seq_len: Longest row in tokens; what happens to a longer one is `too_long`.
        too_long: `truncate` cuts the row's end, and leaves the row out if that is all that was
            trained; `drop` leaves the row out; `error` stops.
            Whatever is cut or left out is counted and reported before training.
        packed: Fill each row of a batch up to `max_seq_len` with whole examples.
        train_on_prompt: Train on all tokens, not only on the assistant's.
        chat_template: `auto` takes the tokenizer's own; else the name of a built-in one.
        shuffle: Visit the rows in a new order each epoch, a function of (seed, epoch).
    """

    path: str = field(validator=not_empty)
    split: str = field(default="train", validator=not_empty)
    files: str = ""
    max_seq_len: int = field(default=2048, validator=ge(2))
    too_long: str = field(default="truncate", validator=in_(("truncate", "drop", "error")))
    packed: bool = False
    train_on_prompt: bool = False
    chat_template: str = "auto"
    shuffle: bool = True


@frozen(kw_only=True)
class ScheduleOptions:
    """`[schedule]`: the learning rate over the run, a pure function of the step.

    Attributes:
        name: `constant`, `linear` (to 0) or `cosine` (to 0), all after a linear warm-up.
        warmup_steps: Length of the warm-up; the first step is at lr/warmup_steps, not 0.
        warmup_ratio: Its length as a share of the run's steps instead, so that a short run is
            not over before its warm-up is.
    """

    name: str = field(default="cosine", validator=in_(("constant", "linear", "cosine")))
    warmup_steps: int = field(default=0, validator=ge(0))
    warmup_ratio: float = field(default=0.0, validator=[ge(0.0), lt(1.0)])

    def __attrs_post_init__(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("set warmup_steps or warmup_ratio, not both")

    def warmup(self, total_steps: int) -> int:
        """The warm-up's length in steps; a ratio is rounded down."""
        return self.warmup_steps or int(self.warmup_ratio * total_steps)


CHECKPOINTING_MODES = ("none", "selective", "block")
"""Of activations, the fastest first; each keeps less than the one before."""
AUTO = "auto"
TORCH = "torch"


def faster_mode(mode: str) -> str:
    """The mode of activation checkpointing that keeps more than this one, but the least of those;
    of the fastest, itself."""
    return CHECKPOINTING_MODES[max(0, CHECKPOINTING_MODES.index(mode) - 1)]


def mode_text(mode: str, blocks: int) -> str:
    """A mode of activation checkpointing, of so many blocks; 0 for all."""
    if not blocks:
        return mode
    some = f"{blocks} block{'s' if blocks > 1 else ''}"
    return f"{mode} for {some}, {faster_mode(mode)} for the others"


def _checkpointing_mode(value: bool | str) -> str:
    return value if isinstance(value, str) else ("block" if value else "none")


@frozen(kw_only=True)
class TrainingOptions:
    """`[training]`: the loop's own keys.

    Attributes:
        epochs: Passes over the data.
        batch_size: Rows in a micro-batch.
        gradient_accumulation_steps: Micro-batches in an optimizer step.
        max_steps: Stop after so many optimizer steps; 0 means no limit.
        max_grad_norm: Clip the gradients' global 2-norm to this; 0 means never.
        activation_checkpointing: Keep less for the backward pass, and compute it again there.
            `selective` computes again what leads to attention and what is inside of feed-forward
            layers, as far as that is the same each time; `block` (or true) keeps only each
            block's input, the least; `none` (or false) keeps all; `auto` takes the first of
            `none`, `selective` and `block` that fits by the memory estimate, for as few blocks as
            do.
        checkpointed_blocks: Of how many blocks, the first ones, that holds; 0 for all.  The others
            are in the next faster mode: `none` beside `selective`, `selective` beside `block`.
        memory_limit: GiB that the run is to do with, for `auto` and for the check before it starts;
            0 for all that is there.
        activation_offloading: Move the blocks' inputs to host memory until the backward pass
            needs them.  On CUDA; elsewhere they are there already.
        compile: Run each block through torch.compile.
        share_prefixes: Compute once what documents of a micro-batch begin with in common.
        join_micro_batches: Compute micro-batches of an optimizer step that follow each other as
            one, as long as they have no more tokens together, nor trained ones, than the run's
            largest.
        kernels: What computes the fp32 products on a CPU: `torch`, or kernels that a plugin brings,
            by name; `auto` takes those of a plugin where the processor has what they need.
        fused: Hand-written backward passes that keep little; false computes the same by plain
            autograd, with about twice the memory for activations.
        profile: Record two steps early in the run, in the run directory's `profile/`.
    """

    epochs: int = field(default=1, validator=ge(1))
    batch_size: int = field(default=1, validator=ge(1))
    gradient_accumulation_steps: int = field(default=1, validator=ge(1))
    max_steps: int = field(default=0, validator=ge(0))
    max_grad_norm: float = field(default=1.0, validator=ge(0.0))
    activation_checkpointing: bool | str = field(default="none", converter=_checkpointing_mode)
    checkpointed_blocks: int = field(default=0, validator=ge(0))
    memory_limit: float = field(default=0.0, validator=ge(0.0))
    activation_offloading: bool = field(default=False)
    compile: bool = False
    share_prefixes: bool = True
    join_micro_batches: bool = True
    kernels: str = AUTO
    fused: bool = True
    profile: bool = False

    @activation_checkpointing.validator
    def _is_a_mode(self, _: attrs.Attribute[bool | str], value: bool | str) -> None:
        names = (*CHECKPOINTING_MODES, AUTO)
        if isinstance(value, str) and value not in names:
            hint = did_you_mean(value, names)
            known = listing(("true", "false", *names))
            raise ValueError(f'"{value}" is none of {known}{hint}')

    @checkpointed_blocks.validator
    def _has_a_mode(self, _: attrs.Attribute[int], value: int) -> None:
        if value and self.activation_checkpointing in ("none", AUTO):
            raise ValueError(
                'checkpointed_blocks needs activation_checkpointing = "selective" or "block"'
            )

    @activation_offloading.validator
    def _offloads_what_checkpointing_keeps(self, _: attrs.Attribute[bool], value: bool) -> None:
        if value and self.activation_checkpointing != "block":
            raise ValueError('activation_offloading needs activation_checkpointing = "block"')


@frozen(kw_only=True)
class SampleOptions:
    """`[samples]`: prompts answered before and after training, to see what it changed.

    Attributes:
        prompts: One user message each.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = field(default=64, validator=ge(1))
    temperature: float = field(default=0.0, validator=[ge(0.0), le(5.0)])


@frozen(kw_only=True)
class EvaluationOptions:
    """`[evaluation]`: the loss over rows that are not trained on, while the run trains.

    The rows are another file's or split's, read with the recipe's `[data]` options, or a share of
    the recipe's own.

    Attributes:
        path: As `data.path`; empty means that path, of which `split` or `files` picks other rows.
        split: Of a data set on the hub: `validation`; empty means `train`.
        files: A glob that picks files of a directory or of a data set on the hub.
        fraction: Hold out this share of the training rows, one at least, instead.  Which ones
            follows from the recipe's seed.
        max_rows: Take the first so many rows, or hold out so many at the most; 0 means no limit.
        every_steps: Evaluate each time so many optimizer steps are done, too; 0 means only at
            the end of each epoch and of the run.
        at_start: Evaluate before the first step, too.
        keep_best: Save at each loss lower than all before it, and keep the lowest one's checkpoint
            beyond `checkpointer.keep_last`.
    """

    path: str = ""
    split: str = ""
    files: str = ""
    fraction: float | None = field(default=None, validator=optional(and_(gt(0.0), lt(1.0))))
    max_rows: int = field(default=0, validator=ge(0))
    every_steps: int = field(default=0, validator=ge(0))
    at_start: bool = True
    keep_best: bool = True

    def __attrs_post_init__(self) -> None:
        named = [key for key in ("path", "split", "files") if getattr(self, key)]
        if self.fraction is not None and named:
            raise ValueError(f"set {named[0]} or fraction, not both")
        if self.fraction is None and not named:
            raise ValueError(
                "set path (rows of their own) or fraction (the share of the training rows that is "
                "held out, such as 0.05)"
            )
