"""The parts of an assembly in order, donors' blocks and what derc adds, with their types, costs and modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from derc import stitching
from derc.artifacts import Assembly, BlockRef, Head, Joint, Stem
from derc.errors import UsageError
from derc.ir import Layout, TensorType, Value, scaled
from derc.stitching import StitchCost

if TYPE_CHECKING:
    from torch import nn

STITCHES = ("linear", "dery", "dery-fc")
"""Kinds of stitch: derc's own, and the paper's between maps and between tokens."""
KINDS: dict[type, str] = {BlockRef: "block", Joint: "stitch", Stem: "stem", Head: "head"}
TOKENS = (Layout.NHWC, Layout.NLC)


class HasCuts(Protocol):
    """A network with its cuts: a `CutDonor`, or a `Lowered`."""

    @property
    def cuts(self) -> tuple[Value, ...]: ...


@dataclass(frozen=True)
class Part:
    """One step from `source` to `target`; `name` is its attribute in model.py and its value in plan.txt."""

    name: str
    spec: BlockRef | Joint | Stem | Head
    source: TensorType
    target: TensorType

    @property
    def kind(self) -> str:
        """What the IR calls it: block, stitch, stem or head."""
        return KINDS[type(self.spec)]

    @property
    def call(self) -> tuple[str, dict[str, Any]]:
        """The class in `derc.modules` and its arguments; for what derc adds, not for blocks."""
        match self.spec:
            case Joint():
                return _stitch_call(self.spec, self.source, self.target)
            case Stem():
                return "Stem", {"channels": self.spec.channels, "mean": self.spec.mean, "std": self.spec.std}
            case Head():
                kind = self.source
                return "Head", {
                    "layout": str(kind.layout),
                    "channels": kind.channels,
                    "prefix": kind.prefix,
                    "classes": self.spec.classes,
                }
            case _:
                raise TypeError(f"{self.name} is a donor's block")

    @property
    def cost(self) -> StitchCost:
        """Parameters, multiply-accumulates and output bytes for one image; not for blocks."""
        size = 4 * self.target.numel
        match self.spec:
            case Joint():
                return _stitch_cost(self.spec, self.source, self.target)
            case Stem():
                height, width = (_halved(side) for side in self.source.shape[1:])
                weights = 49 * self.source.channels * self.spec.channels
                return StitchCost(weights + 2 * self.spec.channels, weights * height * width, size)
            case Head():
                weights = self.source.channels * self.spec.classes
                return StitchCost(weights + self.spec.classes, weights, size)
            case _:
                raise TypeError(f"{self.name} is a donor's block")

    @property
    def label(self) -> str:
        """What plan.txt calls it."""
        if not isinstance(self.spec, Joint):
            return str(self.spec)
        shape = stitching.key(self.source, self.target, self.spec.form)
        if self.spec.kind == "linear":
            return shape
        return f"{self.spec.kind}{self.spec.stride if self.spec.stride > 1 else ''}:{shape}"

    @property
    def free(self) -> bool:
        """Whether it is a stitch that does nothing."""
        if not isinstance(self.spec, Joint) or self.spec.kind != "linear":
            return False
        return stitching.free(self.source, self.target, self.spec.form)

    def build(self) -> nn.Module:
        """The module with torch's random initialisation; not for blocks."""
        from derc import modules

        name, arguments = self.call
        module: nn.Module = getattr(modules, name)(**arguments)
        return module


def parts(assembly: Assembly, donors: Mapping[str, HasCuts]) -> tuple[Part, ...]:
    """Every part of an assembly in order."""
    found: list[Part] = []
    value = entry(assembly, donors)
    image = value.shape[1], value.shape[2]
    if assembly.stem:
        found.append(Part("stem", assembly.stem, value, stem_type(assembly.stem)))
        value = found[-1].target
    for index, block in enumerate(assembly.blocks):
        cuts, joint = donors[block.donor].cuts, assembly.joint(index)
        first, last = (scaled(cuts[cut].type, image) for cut in (block.first, block.last))
        if joint:
            found.append(Part(f"stitch{index}", joint, value, first))
        found.append(Part(f"block{index}", block, first, last))
        value = last
    if assembly.head:
        found.append(Part("head", assembly.head, value, TensorType((assembly.head.classes,), Layout.NC)))
    return tuple(found)


def few(every: Iterable[Part], images: int) -> str:
    """A sentence on the widest linear stitch where it has more inputs than there are images to fit it to, else ""."""
    joints = ((part, part.spec) for part in every if isinstance(part.spec, Joint))
    linear = (part for part, joint in joints if joint.kind == "linear" and joint.form.map == "full")
    widest = max(((_inputs(part), part.label) for part in linear), default=(0, ""))
    if widest[0] <= images:
        return ""
    return (
        f"{images} probe images are fewer than the {widest[0]} channels of the stitch {widest[1]}: "
        "such stitches are regularised, and more images (--probe) fit them better"
    )


def _inputs(part: Part) -> int:
    """Inputs of a linear stitch's widest regression: that of prefix tokens sees the source's too."""
    return part.source.channels * (1 + part.source.prefix if part.target.prefix else 1)


def entry(assembly: Assembly, donors: Mapping[str, HasCuts]) -> TensorType:
    """Type of the images that an assembly takes."""
    if assembly.stem:
        return TensorType(assembly.stem.image, Layout.NCHW)
    return donors[assembly.blocks[0].donor].cuts[assembly.blocks[0].first].type


def stem_type(stem: Stem) -> TensorType:
    """What a fresh stem gives."""
    _, height, width = stem.image
    shape = stem.channels, _halved(_halved(height)), _halved(_halved(width))
    return scaled(TensorType(shape, Layout.NCHW), (height, width))


def _halved(side: int) -> int:
    """Positions along one axis after a convolution or pooling of stride 2 that is padded to keep the edges."""
    return (side - 1) // 2 + 1


def strided(joint: Joint, source: TensorType) -> tuple[int, int] | None:
    """The grid that the paper's stitch gives, None where the source has none."""
    if source.spatial is None:
        return None
    return source.spatial[0] // joint.stride, source.spatial[1] // joint.stride


def check_joint(joint: Joint, source: TensorType, target: TensorType) -> None:
    """Raise UsageError, saying why, where no such stitch leads from `source` to `target`."""
    types = f"from {stitching.describe(source)} to {stitching.describe(target)}"
    if not stitching.convertible(source, target):
        raise UsageError(f"no stitch leads {types}: end or begin the block elsewhere")
    if joint.kind == "linear":
        reason = stitching.obstacle(source, target, joint.form)
        if reason:
            raise UsageError(f"a stitch {types} cannot be {joint.form.name}: {reason}")
        return
    layouts = TOKENS if joint.kind == "dery-fc" else (Layout.NCHW, *TOKENS)
    positions = all(kind.layout in layouts and kind.spatial and not kind.prefix for kind in (source, target))
    if not positions:
        what = "tokens" if joint.kind == "dery-fc" else "maps or tokens"
        raise UsageError(f"a {joint.kind} stitch joins {what} on a grid, not {types}: use a linear one")
    if strided(joint, source) != target.spatial:
        raise UsageError(
            f"a {joint.kind} stitch of stride {joint.stride} leads not {types}: set its stride, or give the block "
            'grid = "keep", or use a linear stitch, which regrids'
        )


def _stitch_call(joint: Joint, source: TensorType, target: TensorType) -> tuple[str, dict[str, Any]]:
    if joint.kind == "linear":
        return "Stitch", stitching.arguments(source, target, joint.form)
    if joint.kind == "dery-fc":
        grid = target.spatial if target.layout is Layout.NHWC else None
        return "DeryTokenStitch", {"channels": source.channels, "width": target.channels, "grid": grid}
    return "DeryStitch", {
        "source": (str(source.layout), source.channels, source.spatial),
        "target": (str(target.layout), target.channels),
        "stride": joint.stride,
    }


def _stitch_cost(joint: Joint, source: TensorType, target: TensorType) -> StitchCost:
    if joint.kind == "linear":
        return stitching.cost(source, target, joint.form)
    height, width = strided(joint, source) or (1, 1)
    weights = source.channels * target.channels * joint.stride**2
    return StitchCost(2 * source.channels + weights, weights * height * width, 4 * target.numel)
