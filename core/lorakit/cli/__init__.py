"""The command line: thin modules, one a command group.  Nothing here imports torch."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from lorakit import __version__
from lorakit.cli.adapters import eval_command, generate, merge
from lorakit.cli.estimate import estimate
from lorakit.cli.plugins import plugins
from lorakit.cli.recipes import recipes
from lorakit.cli.train import preview, train
from lorakit.errors import Interrupted, LorakitError, UserError, did_you_mean
from lorakit.interrupts import signal_of, signals_raised


class _Group(click.Group):
    """Suggests the nearest command for one that does not exist, and ends a stopped one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            hint = did_you_mean(args[0], self.list_commands(ctx))
            ctx.fail(f"no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # Whatever the command was, it leaves nothing half done.
            number = signal_of(error)
            word = "terminated" if number == signal.SIGTERM else "interrupted"
            raise Interrupted(word, number) from None


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="RECIPE is FILE.toml:NAME, or the NAME of a recipe that ships with lorakit.",
)
@click.version_option(__version__, prog_name="lorakit")
def app() -> None:
    """Fine-tune large language models with LoRA on one device."""


for command in (train, recipes, plugins, preview, estimate, merge, generate, eval_command):
    app.add_command(command)

_OF_THE_PATH = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOSPC,
    errno.EDQUOT,
}
"""What a file system says that no mistake of lorakit's could be the reason of."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exit status 0 done, 1 the run failed, 2 the input is wrong,
    130 interrupted, 143 terminated."""
    with signals_raised():
        try:
            _main(arguments)
        except KeyboardInterrupt as error:
            # While the end of the command was being told.
            sys.exit(128 + signal_of(error))


def _main(arguments: Sequence[str] | None) -> None:
    try:
        status = app.main(args=arguments, standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.exceptions.Abort as error:
        print("lorakit: interrupted", file=sys.stderr)
        sys.exit(128 + signal_of(error.__cause__))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except LorakitError as error:
        word = "lorakit" if isinstance(error, Interrupted) else "error"
        print(f"{word}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader (`| head`) has gone; its end is not our failure.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        sys.exit(UserError.exit_status)
