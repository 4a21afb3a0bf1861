"""A model source: names on a shelf, which is a directory the environment names."""

import os
from pathlib import Path

from lorakit import UserError, hookimpl
from lorakit.records import ModelSource


def claims(path):
    return path.startswith("shelf:")


def fetch(path, progress):
    found = Path(os.environ["SHELF"]) / path.removeprefix("shelf:")
    if not found.is_dir():
        raise UserError(f"model.path: the shelf has no {path}")
    return found


@hookimpl
def lorakit_model_sources():
    return [
        ModelSource(
            name="shelf", summary="a shelf", claims=claims, fetch=fetch, examples=("shelf:NAME",)
        )
    ]
