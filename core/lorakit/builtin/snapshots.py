"""Checkpoints as safetensors and JSON.

A checkpoint is written into a directory beside its place and renamed into it, its manifest
last: a crash at any moment leaves either a complete checkpoint or one that is never resumed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.atomic import replaced_directory, write_bytes
from lorakit.errors import RunError, UserError
from lorakit.options import CheckpointerOptions
from lorakit.protocols import Snapshot

ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TENSORS = "training_state.safetensors"
STATE = "training_state.json"
"""The manifest: a directory without it is no checkpoint."""


def open_store(run_directory: Path, options: CheckpointerOptions) -> SafetensorsStore:
    return SafetensorsStore(run_directory / "checkpoints", options.keep_last)


class SafetensorsStore:
    """A `lorakit.protocols.SnapshotStore`: `checkpoints/step-00000100/` and its like."""

    def __init__(self, root: Path, keep_last: int) -> None:
        self.root = root
        self.keep_last = keep_last

    def save(self, snapshot: Snapshot) -> Path:
        """Raises RunError if the disk does not take it."""
        from lorakit.weights.shard_writer import write_tensors

        place = self._place(snapshot.step)
        try:
            with replaced_directory(place) as folder:
                write_tensors(folder / ADAPTER_TENSORS, snapshot.adapter)
                write_bytes(folder / ADAPTER_CONFIG, _json(snapshot.adapter_config))
                write_tensors(folder / TENSORS, snapshot.tensors)
                write_bytes(folder / STATE, _json({"step": snapshot.step, **snapshot.state}))
        except OSError as error:
            raise RunError(
                f"{place}: the checkpoint could not be written: {error}. "
                f"Checkpoints from before are untouched."
            ) from None
        self._drop_old(snapshot.kept_steps)
        return place

    def steps(self) -> list[int]:
        if not self.root.is_dir():
            return []
        names = [p.name for p in self.root.iterdir() if (p / STATE).is_file()]
        numbers = [name.removeprefix("step-") for name in names if name.startswith("step-")]
        return sorted(int(n) for n in numbers if n.isdigit())

    def load(self, step: int) -> Snapshot:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        place = self._place(step)
        try:
            state = json.loads((place / STATE).read_text(encoding="utf-8"))
            config = json.loads((place / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            adapter = load_file(place / ADAPTER_TENSORS)
            tensors = load_file(place / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{place}: the checkpoint cannot be read: {error}",
                "Delete that directory to resume from the one before.",
            ) from None
        return Snapshot(state.pop("step"), adapter, config, tensors, state)

    def _place(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _drop_old(self, kept: Sequence[int]) -> None:
        if self.keep_last:
            for step in self.steps()[: -self.keep_last]:
                if step in kept:
                    continue
                place = self._place(step)
                # The manifest goes first, so that a half-deleted checkpoint is none.
                os.unlink(place / STATE)
                shutil.rmtree(place)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
