"""ONNX models of what is measured, donors, blocks, stitches and assemblies, sliced out of few exports in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from derc import deployed, exporting, stitching
from derc.artifacts import Array, Assembly, BlockRef, CutZoo, digest
from derc.assembled import seeded
from derc.exporting import Slicer
from derc.parts import parts
from derc.pipeline import Context, code_version
from derc.stitch_latency import Shape


@dataclass
class Slices:
    """Models of a zoo's parts at the target's batch size; `shapes` are the stitches', by `stitching.key`.

    `rewritten` holds the blocks in lower precisions, by `str(BlockRef)`.
    """

    context: Context
    cuts: CutZoo
    shapes: Mapping[str, Shape]
    rewritten: dict[str, bytes] = field(default_factory=dict)
    _slicers: dict[str, Slicer] = field(default_factory=dict)

    def donor(self, name: str) -> bytes:
        """The intact network."""
        return self._span(name, 0, len(self.cuts.donors[name].units))

    def block(self, block: BlockRef) -> bytes:
        """One block in its precision."""
        if block.plain is not block:
            return self.rewritten[str(block)]
        return self._span(block.donor, block.first, block.last)

    def stitch(self, key: str) -> bytes:
        """A stitch of one shape, its weights random."""
        return self._stitches.slice((f"in {key}",), (f"out {key}",))

    def assembly(self, assembly: Assembly) -> bytes:
        """A whole network of float32 blocks, its stitches random."""
        models = []
        for part in parts(assembly, self.cuts.donors):
            if isinstance(part.spec, BlockRef):
                models.append(self.block(part.spec))
            elif not part.free:
                models.append(self.stitch(part.label))
        return exporting.join(models)

    def rewrite(self, block: BlockRef, samples: list[Array]) -> None:
        """Add `block` of a lower precision, calibrated on `samples`; raises what the engine's rewrite does."""
        model = self.context.engine.rewrite(self.block(block.plain), block.precision, samples)
        self.rewritten[str(block)] = model

    def _span(self, donor: str, first: int, last: int) -> bytes:
        if donor not in self._slicers:
            self._slicers[donor] = Slicer(deployed.donor_model(self.context, donor))
        return self._slicers[donor].slice((f"cut_{first}",), (f"cut_{last}",))

    @cached_property
    def _stitches(self) -> Slicer:
        batch, code = self.context.target.batch, code_version(exporting.__name__)
        key = digest(["stitches", sorted(self.shapes), batch, code], exporting.versions())
        model = self.context.store.get_bytes(key)
        if model is None:
            with seeded(self.context.seed):
                parts = exporting.Parallel(stitching.build(*self.shapes[name]) for name in sorted(self.shapes))
            examples = tuple(deployed.example(self.shapes[name][0], batch) for name in sorted(self.shapes))
            names = [f"in {name}" for name in sorted(self.shapes)], [f"out {name}" for name in sorted(self.shapes)]
            model = exporting.export(parts, examples, names[1], input_names=names[0])
            self.context.store.put_bytes(key, model, note="onnx stitches")
        return Slicer(model)
