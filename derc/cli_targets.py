"""`derc targets`: the devices that can be compiled for, and the latency tables of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from derc.shelf import Shelf

JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@click.group()
def targets() -> None:
    """The devices that can be compiled for, and the latency tables of them."""


@targets.command("ls")
@JSON
def targets_ls(as_json: bool) -> None:
    """List targets and imported tables."""
    from derc.target_views import listed

    _print(listed(_shelf()), as_json)


@targets.command("show")
@click.argument("name")
@JSON
def targets_show(name: str, as_json: bool) -> None:
    """Show a target, or an imported table, by name; FILE.toml and FILE.json are shown as they are."""
    from derc.target_views import shown

    _print(shown(_shelf(), name), as_json)


@targets.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@JSON
def targets_import(file: Path, as_json: bool) -> None:
    """Keep a latency table (JSON) that was measured elsewhere, or a target (TOML)."""
    from derc.target_views import imported

    _print(imported(_shelf(), file), as_json)


@targets.command("export")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@JSON
def targets_export(name: str, file: Path, as_json: bool) -> None:
    """Write an imported table (FILE.json) or a target (FILE.toml) to FILE."""
    from derc.target_views import exported

    _print(exported(_shelf(), name, file), as_json)


@targets.command("remove")
@click.argument("name")
@JSON
def targets_remove(name: str, as_json: bool) -> None:
    """Forget an imported table."""
    found = _shelf().remove(name)
    _print(({"removed": found}, f"removed the table {found}"), as_json)


def _shelf() -> Shelf:
    from derc.console import Console
    from derc.shelf import Shelf
    from derc.store import Store

    return Shelf(Store.default(say=Console().say).root)


def _print(found: tuple[dict[str, Any], str], as_json: bool) -> None:
    click.echo(json.dumps(found[0]) if as_json else found[1])
