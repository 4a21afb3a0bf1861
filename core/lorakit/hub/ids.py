"""What a hub id looks like, judged by its letters alone."""

from __future__ import annotations

import re

from attrs import frozen

MODELS, DATASETS = "model", "dataset"

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w][\w./-]*))?", re.ASCII)
# A name with such an ending is a file's, whatever else it looks like.
_FILE_ENDINGS = (
    *(".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".gz", ".zip"),
    *(".safetensors", ".gguf", ".bin", ".pth", ".pt", ".toml", ".yaml", ".py"),
)


@frozen
class HubId:
    """A repository of the hub.

    Attributes:
        repo: `owner/name`.
        revision: A branch, a tag or a commit; None means the main branch.
        kind: `model` or `dataset`.
    """

    repo: str
    revision: str | None
    kind: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def key(self) -> str:
        """The recipe's key that names it, for messages."""
        return "data.path" if self.kind == DATASETS else "model.path"

    @property
    def page(self) -> str:
        """Its page, below the hub's address."""
        return f"datasets/{self.repo}" if self.kind == DATASETS else self.repo


def parse_hub_id(path: str, kind: str) -> HubId | None:
    """`owner/name` or `owner/name@revision`; None for anything else.

    Whether there is such a repository is not looked at, nor whether a local path is called so:
    a caller lets that win.
    """
    match = _ID.fullmatch(path)
    if not match:
        return None
    repo = match["repo"]
    # The hub's own rules: 96 letters, no doubled or trailing dots and dashes.
    if len(repo) > 96 or "--" in repo or ".." in repo or repo.endswith((".", "-", ".git")):
        return None
    if repo.lower().endswith(_FILE_ENDINGS) or repo.split("/")[0].endswith((".", "-")):
        return None
    return HubId(repo, match["revision"], kind)
