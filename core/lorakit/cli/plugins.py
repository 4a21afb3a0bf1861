"""`lorakit plugins ...`."""

from __future__ import annotations

import json
from typing import Any

import click

WIDTHS = {"kind": 13, "name": 15}
"""Columns of the list, wider only where somebody's names are."""


@click.group()
def plugins() -> None:
    """See what is installed."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="For other programs.")
def list_plugins(as_json: bool) -> None:
    """Every plugin found: its distribution and version, what it provides, and broken or blocked
    ones with the reason."""
    rows, absent = _survey()
    if as_json:
        click.echo(json.dumps({"plugins": rows, "not_installed": absent}, indent=2))
        return
    offers = [offer for row in rows for offer in row["provides"]]
    kind, name = (max([width, *(len(o[key]) for o in offers)]) for key, width in WIDTHS.items())
    for row in rows:
        head = f"{row['distribution']} {row['version']}  [{row['name']}]"
        if row["status"] != "loaded":
            click.echo(f"{head}  {row['status'].upper()}: {row['reason']}")
            continue
        click.echo(head)
        for offer in row["provides"]:
            clash = f"  CLASH: also offered by {offer['clash']}" if offer["clash"] else ""
            columns = f"{offer['kind']:<{kind}}  {offer['name']:<{name}}"
            click.echo(f"  {columns}  {offer['summary']}{clash}")
    if absent:
        width = max(len(entry["distribution"]) for entry in absent)
        click.echo("\nNot installed, from lorakit's own project:")
        for entry in absent:
            click.echo(f"  {entry['distribution']:<{width}}  {entry['summary']}")
            click.echo(f"  {'':<{width}}  {entry['install']}")


def _survey() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    from lorakit.catalog import first_party, load_catalog

    catalog = load_catalog()
    rows = []
    for plugin in catalog.plugins:
        provides = [
            {
                "kind": kind,
                "name": name,
                "summary": offer.record.summary,
                "clash": ", ".join(o.plugin.label for o in offered if o.plugin != plugin),
            }
            for kind, names in catalog.offers.items()
            for name, offered in sorted(names.items())
            for offer in offered
            if offer.plugin == plugin
        ]
        rows.append(
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "status": plugin.status,
                "reason": plugin.reason,
                "provides": provides,
            }
        )
    there = {plugin.distribution for plugin in catalog.plugins}
    absent = [
        {
            "distribution": f.distribution,
            "summary": f.summary,
            "provides": ", ".join(f.provides),
            "install": f"pip install {f.distribution}",
        }
        for f in first_party()
        if f.distribution not in there
    ]
    return rows, absent
