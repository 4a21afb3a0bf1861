"""Weights & Biases for lorakit: the plugin's entry point, which imports neither torch nor wandb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import gt, in_

from lorakit import hookimpl
from lorakit.records import LoggerType

if TYPE_CHECKING:
    from lorakit.protocols import Logger

MODES = ("auto", "online", "offline", "disabled")


@frozen(kw_only=True)
class WandbOptions:
    """`{name = "wandb"}` of `loggers`.

    Attributes:
        project: Project the run belongs to; empty means WANDB_PROJECT, else `lorakit`.
        entity: User or team; empty means WANDB_ENTITY, else the account's default.
        group: Group the run is shown in.
        tags: Tags of the run.
        run_name: Shown name; empty means the run directory's name.
        mode: `online`, `offline` (files only, for `wandb sync` later) or `disabled`; `auto` is
            what WANDB_MODE says, else online.
        timeout: Seconds to wait for the server at the start, and for the upload at the end,
            before the run goes on without it.
    """

    project: str = ""
    entity: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()
    run_name: str = ""
    mode: str = field(default="auto", validator=in_(MODES))
    timeout: float = field(default=30.0, validator=gt(0.0))


def open_wandb(run_directory: Path, options: WandbOptions) -> Logger:
    """See `lorakit_wandb.logger.WandbLogger`."""
    from lorakit_wandb.logger import WandbLogger

    return WandbLogger(options)


@hookimpl
def lorakit_loggers() -> list[LoggerType]:
    return [
        LoggerType(name="wandb", summary="Weights & Biases", options=WandbOptions, open=open_wandb)
    ]
