"""A logger that writes all it is told."""

import json

from attrs import frozen

from lorakit import hookimpl
from lorakit.records import LoggerType


@frozen(kw_only=True)
class DiaryOptions:
    """`{name = "diary"}` of `loggers`.

    Attributes:
        file: Name of the file in the run directory.
    """

    file: str = "diary.jsonl"


class Diary:
    def __init__(self, directory, options):
        self.path = directory / options.file

    def write(self, *entry):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def start(self, run):
        self.write("start", run.name, run.total_steps, run.trainable_parameters)

    def metrics(self, values):
        self.write("metrics", dict(values))

    def notice(self, text):
        self.write("notice", text)

    def finish(self):
        self.write("finish")


@hookimpl
def lorakit_loggers():
    return [LoggerType(name="diary", summary="a diary", options=DiaryOptions, open=Diary)]
