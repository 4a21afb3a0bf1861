"""A checkpointer that keeps snapshots in this process."""

import json

from lorakit import UserError, hookimpl
from lorakit.options import CheckpointerOptions
from lorakit.protocols import Snapshot
from lorakit.records import CheckpointerType

KEPT = {}


class Store:
    def __init__(self, directory, options):
        self.directory = directory
        self.keep_last = options.keep_last
        self.kept = KEPT.setdefault(str(directory), {})

    def save(self, snapshot):
        copied = Snapshot(
            snapshot.step,
            {k: v.clone() for k, v in snapshot.adapter.items()},
            json.loads(json.dumps(snapshot.adapter_config)),
            {k: v.clone() for k, v in snapshot.tensors.items()},
            json.loads(json.dumps(snapshot.state)),
        )
        self.kept[snapshot.step] = copied
        for step in self.steps()[: -self.keep_last] if self.keep_last else []:
            if step not in snapshot.kept_steps:
                del self.kept[step]
        return self.directory

    def steps(self):
        return sorted(self.kept)

    def load(self, step):
        if step not in self.kept:
            raise UserError(f"no snapshot {step}")
        return self.kept[step]


@hookimpl
def lorakit_checkpointers():
    return [
        CheckpointerType(
            name="memory", summary="in this process", options=CheckpointerOptions, open=Store
        )
    ]
