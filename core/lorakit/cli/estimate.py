"""`lorakit estimate`."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("recipe")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="As for train.")
@click.option(
    "--compare",
    "comparison",
    is_flag=True,
    help="Each quantization and none, with each mode of activation checkpointing.",
)
@click.option(
    "--without-data", is_flag=True, help="Take every row to be data.max_seq_len tokens long."
)
@click.option("--json", "as_json", is_flag=True, help="For other programs; in bytes.")
def estimate(
    recipe: str, overrides: tuple[str, ...], comparison: bool, without_data: bool, as_json: bool
) -> None:
    """Show how much memory RECIPE will take, by part, whether it fits, and what would."""
    from lorakit.recipes import parse_override, resolve_recipe

    resolved = resolve_recipe(recipe, overrides=dict(parse_override(text) for text in overrides))
    from lorakit.estimate import report as words
    from lorakit.estimate.check import estimate_recipe

    found, rows = estimate_recipe(resolved, use_data=not without_data, comparison=comparison)
    if as_json:
        content = words.as_json(found)
        if comparison:
            content["compare"] = [
                {"quantization": row.quantization, **words.as_json(row.report)} for row in rows
            ]
        click.echo(json.dumps(content, indent=2))
        return
    lines = words.table(found)
    if comparison:
        lines += ["", *words.comparison_table(rows)]
    click.echo("\n".join(lines))
