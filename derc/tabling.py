"""Latency tables of a zoo: what the profile measured as a file, and what can be said of a device that is not here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from derc import portable, recorded
from derc.artifacts import CutZoo, LatencyTable, Partition
from derc.deployed import donor_model, exportable
from derc.devices import describe_machine
from derc.exporting import Slicer
from derc.measure import MeasureOptions
from derc.passes.profile import Profile
from derc.pipeline import Context
from derc.recorded import Foreseen, Wanted
from derc.shelf import Shelf
from derc.stitch_latency import Shape, stitch_shapes
from derc.tables import TableFile, span
from derc.workload import Work, slice_work, stitch_work


def table_file(
    context: Context,
    cuts: CutZoo,
    partition: Partition,
    table: LatencyTable,
    limit_s: float | None,
    *,
    now: datetime | None = None,
) -> TableFile:
    """`table`, measured on the context's target, as a file.

    `limit_s` is what the measurement was allowed; None, as long as it took, is written as 0.
    """
    profile, measure = Profile(limit_s=limit_s), MeasureOptions()
    gpu = context.target.device is not None and context.target.device.kind == "gpu"
    return portable.describe(
        table,
        context.target,
        digests={name: context.zoo[name].digest() for name in partition.blocks},
        cuts=cuts.donors,
        works=works(context, cuts, table.blocks, stitch_shapes(cuts, partition)),
        machine=describe_machine(gpu=gpu),
        options={"precision": profile.precision, "confidence": measure.confidence, "limit_s": limit_s or 0.0},
        created=(now or datetime.now(UTC)).isoformat(timespec="seconds"),
    )


def foresee(context: Context, cuts: CutZoo, partition: Partition, precisions: Iterable[str] = ("fp32",)) -> Foreseen:
    """A latency table for the context's target without its device, by the tables that the user imported.

    Every block stands in it in each of `precisions`. Raises as `derc.recorded.foresee` does, and UsageError where no
    donor can be exported.
    """
    partition, failed = exportable(context, partition)
    shapes = stitch_shapes(cuts, partition)
    refs = [replace(b, precision=p) for chain in partition.blocks.values() for b in chain for p in precisions]
    wanted = Wanted(
        digests={name: context.zoo[name].digest() for name in partition.blocks},
        cuts=cuts.donors,
        blocks={str(ref): ref for ref in refs},
        stitches=tuple(shapes),
        batch=context.target.batch,
    )
    tables = list(Shelf(context.store.root).tables().values())
    found = recorded.foresee(context.target, wanted, works(context, cuts, wanted.blocks, shapes), tables)
    return replace(found, table=replace(found.table, failed={**found.table.failed, **failed}))


def works(context: Context, cuts: CutZoo, blocks: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, Work]:
    """Work of the donors of `blocks`, whole, of the blocks and of the stitches, by their names in a latency table."""
    spans: dict[str, list[tuple[str, int, int]]] = {}
    for block in blocks:
        donor, first, last, _ = span(block)
        spans.setdefault(donor, [(donor, 0, len(cuts.donors[donor].units))]).append((block, first, last))
    found: dict[str, Work] = {}
    for donor, parts in spans.items():
        slicer = Slicer(donor_model(context, donor))
        known: dict[tuple[int, int], Work] = {}
        for name, first, last in parts:
            if (first, last) not in known:
                known[first, last] = slice_work(slicer, (f"cut_{first}",), (f"cut_{last}",))
            found[name] = known[first, last]
    batch = context.target.batch
    return found | {key: stitch_work(one, other, batch, form) for key, (one, other, form) in shapes.items()}
