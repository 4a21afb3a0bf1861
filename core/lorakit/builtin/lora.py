"""LoRA, rsLoRA and DoRA over any linear layer, in PEFT's format.

References: Hu et al. 2021, arXiv 2106.09685 (LoRA); Kalajdzievski 2023, arXiv 2312.03732
(rsLoRA); Liu et al. 2024, arXiv 2402.09353 (DoRA).  File format: Hugging Face PEFT's
adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import field, frozen
from attrs.validators import and_, deep_mapping, ge, gt, lt

from lorakit.errors import UserError, did_you_mean, listing
from lorakit.options import AdapterOptions
from lorakit.structuring import structure

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
ALL_LINEAR = "all-linear"


@frozen(kw_only=True)
class LoRAOptions(AdapterOptions):
    """`[adapter]` with `name = "lora"`.

    Attributes:
        rank: r, the width of the update.
        alpha: The update is scaled by alpha/r, or by alpha/sqrt(r) with rslora.
        dropout: Share of the input dropped on its way into the adapter, in training.
        targets: `all-linear` (every linear layer but the head); a list of names or name
            endings (`q_proj`, `layers.0.mlp.up_proj`); or a regex over the whole dotted name.
        rslora: Scale by alpha/sqrt(r).
        dora: Train each output row's length apart from its direction.
        rank_pattern: Ranks of some layers.  A key is a name, a name ending (`q_proj`) or a regex
            for one (`layers\\.0\\.mlp\\..*`), matched as PEFT does: against the whole name, or
            what follows one of its dots; of several that match, the first counts.
        alpha_pattern: The same for alpha.
    """

    rank: int = field(default=8, validator=ge(1))
    alpha: float = field(default=16.0, validator=gt(0.0))
    dropout: float = field(default=0.0, validator=and_(ge(0.0), lt(1.0)))
    targets: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, int] = field(
        factory=dict, validator=deep_mapping(value_validator=ge(1))
    )
    alpha_pattern: dict[str, float] = field(
        factory=dict, validator=deep_mapping(value_validator=gt(0.0))
    )

    def rank_at(self, name: str) -> int:
        """r of the layer of that dotted name."""
        return _at(self.rank_pattern, name, self.rank)

    def scale_at(self, name: str) -> float:
        """s of the layer of that dotted name."""
        rank, alpha = self.rank_at(name), _at(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _at(pattern: Mapping[str, T], name: str, default: T) -> T:
    return next((value for key, value in pattern.items() if _is_match(key, name)), default)


def _is_match(key: str, name: str) -> bool:
    """As PEFT matches a key of `rank_pattern`."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def targets(options: LoRAOptions, linears: Sequence[str]) -> list[str]:
    """The linear layers to wrap; `linears` has the head last.

    Raises:
        UserError: A target matches no linear layer, or a key of a pattern none of those to wrap;
            the message lists what exists.
    """
    names = _targeted(options, linears)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(f"adapter.{key}", getattr(options, key), names)
    return names


def _targeted(options: LoRAOptions, linears: Sequence[str]) -> list[str]:
    if options.targets == ALL_LINEAR:
        return list(linears[:-1])
    if isinstance(options.targets, str):
        return _matching(options.targets, linears)
    wanted = [(t, [n for n in linears if n == t or n.endswith(f".{t}")]) for t in options.targets]
    unmatched = [target for target, names in wanted if not names]
    if unmatched or not wanted:
        raise _no_match(unmatched, linears)
    chosen = {name for _, names in wanted for name in names}
    return [name for name in linears if name in chosen]


def _matching(pattern: str, linears: Sequence[str]) -> list[str]:
    """A single string is a name ending, or a regex over the whole name (as PEFT has it)."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"adapter.targets: not a valid regex: {pattern!r}: {error}") from None
    names = [n for n in linears if n.endswith(f".{pattern}") or regex.fullmatch(n)]
    if not names:
        raise _no_match([pattern], linears)
    return names


def _no_match(unmatched: Sequence[str], linears: Sequence[str]) -> UserError:
    endings = _endings(linears)
    if not unmatched:
        return UserError("adapter.targets: the list is empty", f"There is: {listing(endings)}.")
    hint = did_you_mean(unmatched[0], endings)
    return UserError(
        f"adapter.targets: no linear layer matches {listing([repr(u) for u in unmatched])}{hint}",
        f'There is: {listing(endings)} (such as {linears[0]}), or "{ALL_LINEAR}".',
    )


def _check_pattern(where: str, pattern: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in pattern:
        try:
            matched = any(_is_match(key, name) for name in names)
        except re.error as error:
            raise UserError(f"{where}: not a valid regex: {key!r}: {error}") from None
        if matched:
            continue
        within = next((name for name in names if f".{key}." in f".{name}"), None)
        hint = did_you_mean(key, [*_endings(names), *names])
        if within is not None:
            escaped = re.escape(key)
            hint = f" ({within} is in it: to match all that is in it, write '{escaped}\\..*')"
        raise UserError(
            f"{where}: no adapted layer matches {key!r}{hint}",
            f"There is: {listing(_endings(names))} (such as {names[0]}).",
        )


def _endings(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def wrap(linear: nn.Module, options: LoRAOptions, name: str) -> nn.Module:
    """`linear` with a LoRA beside it."""
    from lorakit.builtin.lora_linear import LoRALinear

    return LoRALinear(
        linear,
        rank=options.rank_at(name),
        scale=options.scale_at(name),
        dropout=options.dropout,
        dora=options.dora,
    )


def to_config(options: LoRAOptions, names: Sequence[str]) -> dict[str, Any]:
    """The LoRA part of adapter_config.json; targets are spelled out, since not every reader
    knows the `all-linear` shorthand."""
    alphas = _resolved_pattern(options.alpha_pattern, names)
    return {
        "r": options.rank,
        "lora_alpha": _whole(options.alpha),
        "lora_dropout": options.dropout,
        "target_modules": _target_modules(options, names),
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": _resolved_pattern(options.rank_pattern, names),
        "alpha_pattern": {key: _whole(alpha) for key, alpha in alphas.items()},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _whole(value: float) -> float:
    """A whole number as one: PEFT's field is an int."""
    return int(value) if float(value).is_integer() else value


def _resolved_pattern(pattern: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    """The pattern, or what it comes to layer by layer if its order matters: PEFT and others sort
    the keys of the file."""
    matching = [(name, [key for key in pattern if _is_match(key, name)]) for name in names]
    if all(len(keys) <= 1 for _, keys in matching):
        return dict(pattern)
    return {re.escape(name): pattern[keys[0]] for name, keys in matching if keys}


def _target_modules(options: LoRAOptions, names: Sequence[str]) -> list[str]:
    """Name endings if the recipe targets by ending, else the full names.

    An ending stands for every layer that has it, so it may not be used for a choice among the
    layers that have it, which a regex or a longer name may be.
    """
    endings = {n.rpartition(".")[2] for n in names}
    given = {options.targets} if isinstance(options.targets, str) else set(options.targets)
    return sorted(endings if given == {ALL_LINEAR} or endings <= given else names)


def from_config(config: Mapping[str, Any]) -> LoRAOptions:
    """The options an adapter_config.json stands for.

    Raises:
        UserError: It uses a part of PEFT's format that lorakit does not train.
    """
    if whole := config.get("modules_to_save"):
        raise UserError(
            f"adapter_config.json: modules_to_save = {whole!r} is not supported: lorakit trains "
            "and merges low-rank updates only, not whole layers beside them",
            "Merge it with PEFT (merge_and_unload), and use the merged model as the base.",
        )
    refused = {
        "bias": ("none", None),
        "fan_in_fan_out": (False, None),
        "layers_to_transform": (None, []),
        "exclude_modules": (None, []),
        "trainable_token_indices": (None, [], {}),
        "lora_bias": (False, None),
        "target_parameters": (None, []),
        "layer_replication": (None, []),
        "use_qalora": (False, None),
        # These starts change the base weights as well, which the file does not hold.
        "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    }
    for key, accepted in refused.items():
        if config.get(key) not in accepted:
            raise UserError(f"adapter_config.json: {key} = {config[key]!r} is not supported")
    found = config.get("target_modules")
    if not found or "r" not in config:
        raise UserError("adapter_config.json: r and target_modules are needed")
    table = {
        "rank": config["r"],
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout", 0.0),
        "targets": found,
        "rslora": bool(config.get("use_rslora", False)),
        "dora": bool(config.get("use_dora", False)),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }
    options, problems = structure(LoRAOptions, table, "adapter_config.json")
    if options is None:
        raise UserError("\n".join(problems))
    return options


def merge(weight: Tensor, tensors: Mapping[str, Tensor], options: LoRAOptions, name: str) -> Tensor:
    """W + s B A, or with DoRA m (W + s B A) / ||W + s B A||, in fp32.

    Args:
        weight: W `[out, in]`.
        tensors: `lora_A.weight` `[r, in]`, `lora_B.weight` `[out, r]` and, with DoRA,
            `lora_magnitude_vector` `[out]`.
        options: Give s.
        name: The linear's dotted name, for messages.
    """
    a, b = tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float()
    # In place: the largest layers of a large model take gigabytes in fp32.
    merged = weight.to(a.dtype, copy=True).addmm_(b, a, alpha=options.scale_at(name))
    if options.dora:
        magnitude = tensors["lora_magnitude_vector"].float()
        # Above 0, so that a row of zeros stays one.
        norms = merged.norm(dim=1).clamp_min(1e-19)
        merged *= (magnitude / norms).unsqueeze(1)
    return merged
