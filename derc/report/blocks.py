"""Blocks in the colours of their equivalence sets: the chosen assembly as a strip, each donor's partition as a bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from derc.report import palette, quantities


@dataclass(frozen=True)
class Block:
    """One coloured block; `share` is its part of the MACs in its row, `units` reads `first:last`."""

    donor: str
    units: str
    set: int | None
    share: float
    title: str
    colour: str
    ink: str
    chosen: bool = False
    params: int | None = None
    macs: int | None = None
    precision: str = "fp32"


@dataclass(frozen=True)
class Joint:
    """A place of the strip: the stitch in front of the block, if there is one, and the block."""

    stitch: Mapping[str, Any] | None
    block: Block


@dataclass(frozen=True)
class Bar:
    """One donor's blocks, in order, with its MACs."""

    donor: str
    macs: int
    blocks: list[Block]


def strip(manifest: Mapping[str, Any]) -> list[Joint]:
    """The chosen assembly from input to output."""
    selected = manifest.get("selected") or {}
    blocks = selected.get("blocks") or []
    stitches = {stitch.get("before"): stitch for stitch in selected.get("stitches") or []}
    row = _row(blocks, [block.get("donor") or quantities.DASH for block in blocks], set())
    return [Joint(stitches.get(position), block) for position, block in enumerate(row)]


def bars(manifest: Mapping[str, Any]) -> list[Bar]:
    """The partition, donor by donor; the blocks that the assembly took are marked as chosen."""
    selected = (manifest.get("selected") or {}).get("blocks") or []
    chosen = {(block.get("donor"), block.get("first"), block.get("last")) for block in selected}
    partition = manifest.get("partition") or {}
    return [
        Bar(donor, sum(block.get("macs") or 0 for block in blocks), _row(blocks, [donor] * len(blocks), chosen))
        for donor, blocks in partition.items()
        if blocks
    ]


def legend(manifest: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The equivalence sets that the partition or the assembly names, with their colours."""
    rows = [*(manifest.get("partition") or {}).values(), (manifest.get("selected") or {}).get("blocks")]
    numbers = {block["set"] for row in rows for block in row or [] if block.get("set") is not None}
    return [(number, palette.of_set(number)) for number in sorted(numbers)]


def _row(blocks: list[Mapping[str, Any]], donors: list[str], chosen: set[tuple[Any, ...]]) -> list[Block]:
    total = sum(block.get("macs") or 0 for block in blocks)
    row = []
    for block, donor in zip(blocks, donors, strict=True):
        share = (block.get("macs") or 0) / total if total else 1 / len(blocks)
        colour = palette.of_set(block.get("set"))
        units = ":".join(
            quantities.DASH if end is None else str(end) for end in (block.get("first"), block.get("last"))
        )
        title = (
            f"{donor}[{units}]{_at(block)}, set {quantities.DASH if block.get('set') is None else block['set']}: "
            f"{quantities.count(block.get('macs'))} MACs, {quantities.percent(share)} of the row"
        )
        taken = (donor, block.get("first"), block.get("last")) in chosen
        row.append(
            Block(
                donor=donor,
                units=units,
                set=block.get("set"),
                share=share,
                title=title,
                colour=colour,
                ink=palette.ink(colour),
                chosen=taken,
                params=block.get("params"),
                macs=block.get("macs"),
                precision=block.get("precision") or "fp32",
            )
        )
    return row


def _at(block: Mapping[str, Any]) -> str:
    return f"@{block['precision']}" if block.get("precision", "fp32") != "fp32" else ""
