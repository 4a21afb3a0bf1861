"""`lorakit train` and `lorakit preview`."""

from __future__ import annotations

import sys

import click

from lorakit.interrupts import nothing_saved_told


@click.command()
@click.argument("recipe")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key of the recipe, such as training.epochs=2; repeatable.",
)
@click.option("--output", metavar="DIR", help="The run directory, instead of the recipe's.")
@click.option("--resume", is_flag=True, help="Continue the run in the output directory.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan, train nothing.")
@click.option(
    "--no-memory-check", is_flag=True, help="Start even a run that is estimated not to fit."
)
@nothing_saved_told()
def train(
    recipe: str,
    overrides: tuple[str, ...],
    output: str | None,
    resume: bool,
    dry_run: bool,
    no_memory_check: bool,
) -> None:
    """Train RECIPE: the main job."""
    from lorakit.recipes import parse_override, resolve_recipe

    resolved = resolve_recipe(
        recipe, overrides=dict(parse_override(text) for text in overrides), output=output
    )
    # Only now, so that a mistake in the recipe is told before torch has loaded.
    from lorakit.run import dry_run as run_dry
    from lorakit.run import run_recipe

    if dry_run:
        click.echo(resolved.text(), nl=False)
        for line in run_dry(resolved, resume=resume, fixed_output=output is not None):
            click.echo(line)
        return
    run_recipe(
        resolved,
        resume=resume,
        fixed_output=output is not None,
        check_memory=not no_memory_check,
    )


@click.command()
@click.argument("recipe")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="As for train.")
@click.option(
    "--rows",
    default=2,
    show_default=True,
    type=click.IntRange(0),
    help="How many rows to show.",
)
def preview(recipe: str, overrides: tuple[str, ...], rows: int) -> None:
    """Show the data of RECIPE as the model will see it: what is trained, what is cut."""
    from lorakit.recipes import parse_override, resolve_recipe

    resolved = resolve_recipe(recipe, overrides=dict(parse_override(text) for text in overrides))
    from lorakit.preview import preview_lines

    for line in preview_lines(resolved, rows, color=sys.stdout.isatty()):
        click.echo(line)
