"""Base models from the Hugging Face hub: which files of a repository a run needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lorakit.builtin.hf_directory import claims_local
from lorakit.errors import UserError, listing
from lorakit.hub.ids import MODELS, HubId, parse_hub_id
from lorakit.protocols import Progress

SIDE_FILES = re.compile(
    r"config\.json|generation_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|tokenizer[\w.-]*\.(json|jinja)|tokenizer\.model|tokenizer\.model\.v\d\w*|[\w.-]+\.tiktoken"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[\w.-]+\.jinja"
)
INDEX = ".index.json"
SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.\w+")
META_SHARD = re.compile(r"consolidated\.\d\d\.pth")


def claims(path: str) -> bool:
    """`owner/name`, perhaps with `@revision`, where no local path is called so."""
    return parse_hub_id(path, MODELS) is not None and not claims_local(path)


def hub_name(path: str) -> tuple[str, str | None]:
    """Repository and revision, as adapter_config.json names a base model."""
    hub_id = _parse(path)
    return hub_id.repo, hub_id.revision


def fetch(path: str, progress: Progress) -> Path:
    """Downloads what a run needs of a model: its configuration, its tokenizer, and its weights
    in one format.

    Raises:
        UserError: The hub refuses or is out of reach, there is no such repository, or it has no
            weights that could be trained on.
    """
    from lorakit.hub.repository import open_repository

    hub_id = _parse(path)
    repository = open_repository(hub_id)
    names = list(repository.sizes)
    weights = weight_files(names)
    _check(hub_id, names, weights)
    snapshot = repository.fetch(side_files(names, weights), progress)
    if weights[0].endswith(INDEX):
        index = repository.fetch(weights, progress) / weights[0]
        weights = shards_of(index, hub_id, names)
    repository.fetch(weights, progress)
    return snapshot


def fetch_configuration(path: str, progress: Progress) -> Path:
    """Downloads what `fetch` does but the weights.

    Raises:
        UserError: As `fetch`.
    """
    from lorakit.hub.repository import open_repository

    hub_id = _parse(path)
    repository = open_repository(hub_id)
    names = list(repository.sizes)
    weights = weight_files(names)
    _check(hub_id, names, weights)
    return repository.fetch(side_files(names, weights), progress)


def _check(hub_id: HubId, names: Sequence[str], weights: Sequence[str]) -> None:
    if "config.json" not in names and not any(META_SHARD.fullmatch(n) for n in weights):
        raise UserError(
            f"model.path: {hub_id} has no config.json, so it holds no language model as "
            "transformers writes one",
            "An adapter's repository names its base model in adapter_config.json.",
        )
    if not weights:
        others = sorted({Path(n).suffix for n in names} & {".gguf", ".onnx", ".h5", ".msgpack"})
        raise UserError(
            f"model.path: {hub_id} has no weights that lorakit takes from the hub (safetensors, "
            "pytorch_model.bin, consolidated.NN.pth)"
            + (f"; it has {listing(others)} files" if others else ""),
            "Name another repository of the model"
            + (
                ", or download the .gguf file you want and name that." if ".gguf" in others else "."
            ),
        )


def side_files(names: Iterable[str], weights: Sequence[str]) -> list[str]:
    """All that goes with these weights: configuration, tokenizer, chat template."""
    meta = any(META_SHARD.fullmatch(name) for name in weights)
    return sorted(n for n in names if SIDE_FILES.fullmatch(n) or (meta and n == "params.json"))


def weight_files(names: Iterable[str]) -> list[str]:
    """The weights in the first format that there is, or the index that names them.

    Many repositories hold the same weights several times over (Mistral's in `model-*` and in
    `consolidated`): one copy is taken.
    """
    names = sorted(name for name in names if "/" not in name)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{suffix}{INDEX}" in names:
            return [f"{stem}.{suffix}{INDEX}"]
        if f"{stem}.{suffix}" in names:
            return [f"{stem}.{suffix}"]
        shards = [n for n in names if n.startswith(f"{stem}-") and n.endswith(suffix)]
        if shards and all(SHARD.fullmatch(n) for n in shards):
            return shards
        if suffix == "safetensors":
            rest = [n for n in names if n.endswith(f".{suffix}")]
            rest = [n for n in rest if not n.startswith(("adapter", "consolidated"))]
            if rest:
                return rest
    return [n for n in names if META_SHARD.fullmatch(n)]


def shards_of(index: Path, hub_id: HubId, names: Iterable[str]) -> list[str]:
    """The files that an index names.

    Raises:
        UserError: It is no index, or the repository lacks a file of it.
    """
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not readable as an index of weights: {error!r}") from None
    lacking = sorted(set(shards) - set(names))
    if lacking:
        raise UserError(
            f"model.path: {hub_id} lacks {len(lacking)} of the {len(shards)} weight files that "
            f"its {index.name} names: {listing(lacking[:4])}",
            "The repository is incomplete: another revision may be whole (owner/name@revision).",
        )
    return shards


def _parse(path: str) -> HubId:
    hub_id = parse_hub_id(path, MODELS)
    if hub_id is None:
        raise UserError(f"model.path: {path!r} is no hub id", "One looks like owner/name.")
    return hub_id
