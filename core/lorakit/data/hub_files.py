"""Data sets on the hub: which files are a split's.

A data set's card may say so (https://huggingface.co/docs/hub/datasets-manual-configuration);
else the files' names do (https://huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.files import (
    SUFFIXES,
    DataFile,
    holds_rows,
    matching,
    no_file_in,
    shortened,
    suffix_of,
)
from lorakit.errors import UserError, did_you_mean, listing
from lorakit.hub.ids import HubId
from lorakit.protocols import Progress

CARD = "README.md"
# The words for a split in the names of files, besides the split's own name.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def fetch_data(hub_id: HubId, progress: Progress, *, split: str, pattern: str) -> list[DataFile]:
    """Downloads the files of one split, and nothing else but the card that names them.

    Raises:
        UserError: The hub refuses or is out of reach, there is no such data set, or none of its
            files is that split's.
    """
    from lorakit.hub.repository import open_repository

    repository = open_repository(hub_id)
    rows = sorted(name for name in repository.sizes if holds_rows(name))
    if pattern:
        names = matching(rows, pattern)
    else:
        card: Mapping[str, Any] = {}
        if CARD in repository.sizes:
            card = read_card(repository.fetch([CARD], progress) / CARD)
        names = files_of_split(rows, card, split, str(hub_id))
    if not names:
        raise no_file_in(f"data.path: the data set {hub_id}", rows, pattern)
    folder = repository.fetch(names, progress)
    return [DataFile(folder / name, f"{hub_id}: {name}") for name in names]


def read_card(path: Path) -> Mapping[str, Any]:
    """The YAML header of a data set's card; empty where there is none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    # The file names still say what they say.
    except Exception:
        return {}


def files_of_split(
    rows: Sequence[str], card: Mapping[str, Any], split: str, where: str
) -> list[str]:
    """The files of a split, in the order in which they are read.

    Args:
        rows: All data files' paths in the repository.
        card: The card's YAML header.
        split: `train`, or what the data set calls it.
        where: The data set, for messages.

    Raises:
        UserError: The card names no such split, or neither card nor names tell it.
    """
    config = _config(card, rows, where)
    folder = str(config.get("data_dir") or "").strip("./")
    if folder:
        rows = [name for name in rows if name.startswith(f"{folder}/")]
    if not config.get("data_files"):
        return _by_name(rows, split, where)
    patterns = dict(_splits(config["data_files"]))
    if split not in patterns:
        raise UserError(
            f"data.split: {where} has no split {split!r}{did_you_mean(split, patterns)}",
            f"It has {listing(patterns)}.",
        )
    prefix = f"{folder}/" if folder else ""
    chosen = [name for p in patterns[split] for name in matching(rows, prefix + p)]
    return list(dict.fromkeys(chosen))


def _config(card: Mapping[str, Any], rows: Sequence[str], where: str) -> Mapping[str, Any]:
    """The card's default configuration; empty if the card names no files."""
    listed = card.get("configs")
    configs = [
        config
        for config in (listed if isinstance(listed, list) else [])
        if isinstance(config, Mapping) and (config.get("data_files") or config.get("data_dir"))
    ]
    if len(configs) < 2:
        return configs[0] if configs else {}
    for config in configs:
        if config.get("default") or config.get("config_name") == "default":
            return config
    names = shortened([str(c.get("config_name")) for c in configs])
    raise UserError(
        f"data.path: the data set {where} has {len(configs)} configurations: {names}",
        f"Set data.files to a glob over the files of one: it has {shortened(rows)}.",
    )


def _splits(files: Any) -> Iterator[tuple[str, list[str]]]:
    """split -> globs, from any of the forms a card may write them in."""
    if isinstance(files, Mapping):
        files = [{"split": split, "path": path} for split, path in files.items()]
    files = files if isinstance(files, list) else [files]
    if all(isinstance(entry, Mapping) for entry in files):
        for entry in files:
            path = entry.get("path") or []
            paths = path if isinstance(path, list) else [path]
            yield str(entry.get("split", "train")), [str(p) for p in paths]
    else:
        yield "train", [str(path) for path in files]


def _by_name(rows: Sequence[str], split: str, where: str) -> list[str]:
    main = [name for name in rows if re.fullmatch(rf"data/{re.escape(split)}-.*\.parquet", name)]
    if main:
        return main
    words = WORDS.get(split, (split,))
    named = [name for name in rows if _has_word(name, words)]
    if named:
        return _one_format(named)
    others = [word for key, found in WORDS.items() if key != split for word in found]
    unnamed = [name for name in rows if not _has_word(name, others)]
    if split == "train" and len(unnamed) == 1:
        return unnamed
    if not rows:
        return []
    raise UserError(
        f"data.path: neither the card of the data set {where} nor the names of its files tell "
        f"which are of the split {split!r}",
        f"Set data.files to a glob over them: it has {shortened(rows)}.",
    )


def _has_word(name: str, words: Sequence[str]) -> bool:
    """Whether a part of the path is one of the words: `data/train-00000.parquet`, `dev/a.csv`."""
    parts = re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9])", name.lower())
    return any(word.lower() in parts for word in words)


def _one_format(names: Sequence[str]) -> list[str]:
    """Those in one format: the same rows may lie there in several."""
    for suffix in (".parquet", *SUFFIXES):
        chosen = [name for name in names if suffix_of(name) == suffix]
        if chosen:
            return chosen
    return []
