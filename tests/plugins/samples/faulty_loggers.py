"""A logger that fails at the first step."""

from lorakit import hookimpl
from lorakit.records import LoggerType


class Faulty:
    def __init__(self, directory, options):
        pass

    def start(self, run):
        pass

    def metrics(self, values):
        raise OSError("out of ink")

    def notice(self, text):
        pass

    def finish(self):
        pass


@hookimpl
def lorakit_loggers():
    return [LoggerType(name="faulty", summary="a bad diary", open=Faulty)]
