"""Commands in processes of their own, with their peak memory as the kernel counts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
with open(sys.argv[1], "w") as file:
    json.dump({"code": code, "seconds": seconds, "peak": peak}, file)
"""


class RunFailed(Exception):
    """A command did not end well; the message has the end of what it wrote to stderr."""


@frozen
class Finished:
    """What a command gave.

    Attributes:
        stdout: Its standard output.
        peak_bytes: Its largest resident size, mapped files included (ru_maxrss).
        seconds: From start to end.
    """

    stdout: str
    peak_bytes: int
    seconds: float


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 1800.0
) -> Finished:
    """Runs a command in the root of the repository.

    A small process starts it: the kernel counts what its parent had before the exec as well.

    Raises:
        RunFailed: It did not end with status 0 within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        report, errors = Path(name, "report"), Path(name, "stderr")
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", LAUNCHER, str(report), *command],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
            try:
                stdout, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                raise RunFailed(f"not done after {timeout:.0f} s") from None
            finally:
                # Its own session: whatever it started ends with it.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if not report.exists():
            raise RunFailed(f"the launcher ended with status {process.returncode}")
        done = json.loads(report.read_text())
        if done["code"] != 0:
            last = errors.read_text(errors="replace").strip().splitlines()[-3:]
            raise RunFailed(f"{_status(done['code'])}: {' / '.join(last)[-400:]}")
    peak = int(done["peak"]) * (1 if sys.platform == "darwin" else 1024)
    return Finished(stdout, peak, done["seconds"])


def _status(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
