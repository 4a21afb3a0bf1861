"""`lorakit recipes ...`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from lorakit.errors import LorakitError, UserError


@click.group()
def recipes() -> None:
    """List, show, copy and validate recipes."""


@recipes.command("list")
@click.argument("file", required=False)
def list_recipes(file: str | None) -> None:
    """The recipes of FILE, or those that ship with lorakit."""
    from lorakit.recipe_files import packed_file, read_recipes

    found = read_recipes(file) if file else packed_file()
    width = max((len(name) for name in found.names()), default=0)
    for name in found.names():
        summary = str(found.merged(name).get("summary", ""))
        click.echo(f"{name:<{width}}  {summary}".rstrip())


@recipes.command()
@click.argument("recipe")
def show(recipe: str) -> None:
    """RECIPE with every default spelled out."""
    from lorakit.recipes import resolve_recipe

    click.echo(resolve_recipe(recipe).text(), nl=False)


@recipes.command()
@click.argument("name")
@click.argument("dest", required=False, default="recipes.toml")
def copy(name: str, dest: str) -> None:
    """Copy recipe NAME, as it is written, to DEST (recipes.toml), to be changed there."""
    from lorakit.atomic import why_not_writable, write_file
    from lorakit.recipe_files import find_recipe, read_recipes

    file, recipe = find_recipe(name)
    chain = list(reversed(file.chain(recipe)))
    target = Path(dest)
    if target.is_dir():
        target = target / "recipes.toml"
    if target.suffix != ".toml":
        raise UserError(f"{target}: a recipe file ends in .toml", f"Try {target}.toml")
    before = ""
    if target.exists():
        there = read_recipes(target)
        clash = [n for n in chain if n in there.names()]
        if clash:
            raise UserError(f"{target} holds a recipe {clash[-1]!r} already", "Name another DEST.")
        before = there.text.rstrip() + "\n\n"
    text = before + "\n".join(file.source(n) for n in chain)
    try:
        write_file(target, text.encode())
    except OSError as error:
        why = why_not_writable(target.parent) or error.strerror
        raise UserError(f"{target} cannot be written: {why}", "Name another DEST.") from None
    reference = shlex.quote(f"{target}:{recipe}")
    click.echo(f"wrote {target}; train it with: lorakit train {reference}")


@recipes.command()
@click.argument("recipe", nargs=-1, required=True)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="As for train.")
def validate(recipe: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Check each RECIPE (FILE.toml:NAME, NAME, or FILE.toml for all of it); report every
    problem at once."""
    from lorakit.catalog import load_catalog
    from lorakit.recipe_files import read_recipes
    from lorakit.recipes import parse_override, resolve_recipe

    changes = dict(parse_override(text) for text in overrides)
    catalog = load_catalog()
    failed = False
    for reference in recipe:
        names = [reference]
        if reference.endswith(".toml"):
            names = [f"{reference}:{name}" for name in read_recipes(reference).names()]
        for name in names:
            try:
                resolve_recipe(name, overrides=changes, catalog=catalog)
            except LorakitError as error:
                failed = True
                click.echo(f"error: {error}", err=True)
            else:
                click.echo(f"{name}: valid")
    if failed:
        raise SystemExit(2)
