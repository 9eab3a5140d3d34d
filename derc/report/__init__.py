"""report.html: one self-contained page that shows what a compile found, chose and measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2

from derc.report import blocks, heatmap, quantities, scatter, verdict


def render(manifest: Mapping[str, Any]) -> str:
    """The HTML page of a bundle's manifest; what the manifest leaves null or out shows as a dash."""
    page = _environment().get_template("report.html.j2")
    return page.render(
        m=manifest,
        verdict=verdict.verdict(manifest),
        goals=verdict.goals(manifest),
        gain=verdict.gain(manifest),
        strip=blocks.strip(manifest),
        bars=blocks.bars(manifest),
        sets=blocks.legend(manifest),
        tradeoff=scatter.tradeoff(manifest),
        calibration=scatter.calibration(manifest),
        heat=heatmap.heatmap(manifest),
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("derc.report"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=_dash,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(quantities.FILTERS)
    return environment


def _dash(value: Any) -> Any:
    return quantities.DASH if value is None or isinstance(value, jinja2.Undefined) else value
