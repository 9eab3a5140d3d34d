"""How a benchmark ends: figures on the terminal, everything in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


def give(result: dict[str, Any], output: Path | None) -> None:
    """Print the result's figures, and write all of it to `output` where that is given."""
    click.echo(json.dumps(result["figures"], indent=1))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1), encoding="utf-8")
