"""TensorBoard for lorakit: the plugin's entry point, which imports neither torch nor
tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from lorakit import hookimpl
from lorakit.options import LOCAL_PATH
from lorakit.records import LoggerType

if TYPE_CHECKING:
    from lorakit.protocols import Logger


@frozen(kw_only=True)
class TensorBoardOptions:
    """`{name = "tensorboard"}` of `loggers`.

    Attributes:
        log_dir: Where the event files go; empty means `tensorboard/` in the run directory.
    """

    log_dir: str = field(default="", metadata=LOCAL_PATH)


def open_tensorboard(run_directory: Path, options: TensorBoardOptions) -> Logger:
    """See `lorakit_tensorboard.logger.TensorBoardLogger`."""
    from lorakit_tensorboard.logger import TensorBoardLogger

    return TensorBoardLogger(
        Path(options.log_dir).expanduser() if options.log_dir else run_directory / "tensorboard"
    )


@hookimpl
def lorakit_loggers() -> list[LoggerType]:
    return [
        LoggerType(
            name="tensorboard",
            summary="TensorBoard event files",
            options=TensorBoardOptions,
            open=open_tensorboard,
        )
    ]
