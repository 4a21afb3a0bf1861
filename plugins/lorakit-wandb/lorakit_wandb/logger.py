"""A run's metrics in Weights & Biases."""

from __future__ import annotations

import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from lorakit.atomic import write_file
from lorakit.errors import UserError
from lorakit.protocols import RunInfo
from lorakit_wandb import MODES, WandbOptions

RUN_FILE = "wandb-run.json"

Mode = Literal["online", "offline", "disabled"]


class WandbLogger:
    """Sends each line of metrics to one W&B run.

    The run's id is kept in `wandb-run.json` of the run directory, so that a resumed run goes on
    in the same W&B run.  Where W&B cannot be reached, the run is logged offline and says so.
    """

    def __init__(self, options: WandbOptions) -> None:
        self._options = options
        self._run: Any = None
        self._first_step = 0

    def start(self, run: RunInfo) -> None:
        mode = _mode(self._options)
        if mode == "disabled":
            return
        if mode == "online" and (obstacle := _obstacle(self._options.timeout)):
            mode = "offline"
            _warn(obstacle)
        try:
            self._run = self._open(run, mode)
        except Exception as error:
            if mode == "offline":
                raise
            _warn(str(error).strip().splitlines()[0])
            self._run = self._open(run, "offline")
        # A resumed run stands where the server last heard of it.
        self._first_step = self._run.step
        _write_id(run.output, self._run)

    def _open(self, run: RunInfo, mode: Mode) -> Any:
        import wandb

        # wandb writes elsewhere if its directory is not there yet.
        run.output.mkdir(parents=True, exist_ok=True)
        earlier = _read_id(run.output) if run.first_step else {}
        project = self._options.project or os.environ.get("WANDB_PROJECT", "lorakit")
        return wandb.init(
            id=earlier.get("id"),
            resume="allow",
            project=earlier.get("project", project),
            entity=earlier.get("entity") or self._options.entity or None,
            group=self._options.group or None,
            tags=self._options.tags or None,
            name=self._options.run_name or run.output.name,
            config={
                **run.recipe.table(),
                "recipe": run.name,
                "parameters": run.parameters,
                "trainable_parameters": run.trainable_parameters,
            },
            # The number of epochs may have changed since.
            allow_val_change=True,
            dir=os.fspath(run.output),
            mode=mode,
            settings=wandb.Settings(
                # The terminal is not wandb's to capture: the terminal logger redraws it.
                console="off",
                init_timeout=self._options.timeout,
                finish_timeout=self._options.timeout,
            ),
        )

    def metrics(self, values: Mapping[str, float]) -> None:
        step = int(values["step"])
        if self._run is None:
            return
        # A run that was killed repeats the steps since its last checkpoint; resuming is exact,
        # so W&B has these numbers already.  An evaluation it has not: one that was cut off is made
        # by the resumed run, when W&B takes no more for its step.
        if step >= self._first_step or "eval_loss" in values:
            self._run.log(dict(values), step=max(step, self._first_step))

    def notice(self, text: str) -> None:
        pass

    def finish(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        # While an exception passes, the run counts as failed.
        run.finish(exit_code=1 if sys.exc_info()[0] else 0)


def _mode(options: WandbOptions) -> Mode:
    mode = options.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online")
    if mode not in MODES[1:]:
        raise UserError(f"WANDB_MODE={mode} is none of {', '.join(MODES[1:])}")
    return cast(Mode, mode)


def _obstacle(timeout: float) -> str:
    """Why logging online cannot work; empty if nothing is known to stand in its way.

    wandb itself would ask for a key in the middle of a run that nobody watches, and keep trying
    a server it cannot reach for long after its own timeout.
    """
    import wandb

    if not wandb.login(prompt=False, verify=False):
        return "no API key (`wandb login` or WANDB_API_KEY sets one)"
    settings = wandb.setup().settings
    if settings.http_proxy or settings.https_proxy:
        return ""
    try:
        urllib.request.urlopen(settings.base_url, timeout=timeout).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        # A certificate it does not know is wandb's to judge: there is somebody at least.
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):
            return f"no answer from {settings.base_url} ({reason})"
    return ""


def _read_id(directory: Path) -> dict[str, str]:
    """The W&B run that the run in `directory` was logged to; empty if there was none.

    Raises:
        UserError: The file is damaged; a new W&B run in its place would split the curve.
    """
    path = directory / RUN_FILE
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"id": str(stored["id"]), **{k: str(stored[k]) for k in ("project", "entity")}}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} does not say which W&B run to go on with",
            "Remove it to log to a new one.",
        ) from None


def _write_id(directory: Path, run: Any) -> None:
    stored = {"id": run.id, "project": run.project or "", "entity": run.entity or ""}
    write_file(directory / RUN_FILE, (json.dumps(stored) + "\n").encode())


def _warn(reason: str) -> None:
    text = f"warning: W&B: {reason}; logging offline, `wandb sync` uploads it later"
    print(text, file=sys.stderr, flush=True)
