"""One donor, or one assembly, as a typed dataflow graph with costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from math import prod

import networkx as nx

from derc.errors import DercError


class Layout(StrEnum):
    """What the axes behind the batch axis mean."""

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"
    NC = "NC"
    OTHER = "OTHER"


@dataclass(frozen=True)
class TensorType:
    """Type of a value for one image: `shape` leaves the batch axis out.

    For NLC, `prefix` counts the leading tokens (class, registers) and `grid` gives the (H, W) of the others. `stride`
    is the scale: image pixels from one position to the next, (down, across); None where that is not known.
    """

    shape: tuple[int, ...]
    layout: Layout
    dtype: str = "float32"
    prefix: int = 0
    grid: tuple[int, int] | None = None
    stride: tuple[float, float] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def channels(self) -> int:
        """Size of the channel axis; raises DercError where the layout has none."""
        if self.layout is Layout.OTHER:
            raise DercError(f"a value of shape {self.shape} has no channel axis")
        return self.shape[0] if self.layout is Layout.NCHW else self.shape[-1]

    @property
    def spatial(self) -> tuple[int, int] | None:
        """(H, W) of the positions, or None for NC and unknown layouts."""
        match self.layout:
            case Layout.NCHW:
                return self.shape[1], self.shape[2]
            case Layout.NHWC:
                return self.shape[0], self.shape[1]
            case Layout.NLC:
                return self.grid
            case _:
                return None


def scaled(kind: TensorType, image: tuple[int, int]) -> TensorType:
    """`kind` with the stride of its positions on an image of (H, W) pixels; as it is where it has no known positions.

    The quotients are rounded correctly, so that equal strides are equal floats.
    """
    if kind.spatial is None:
        return kind
    return replace(kind, stride=(image[0] / kind.spatial[0], image[1] / kind.spatial[1]))


@dataclass(frozen=True)
class Value:
    """A named tensor."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class Op:
    """One operation; it defines the value of its own name.

    `kind` is an fx opcode (call_module, call_function, call_method, get_attr), in an assembly block, stitch, stem or
    head. `params` are counted once, at their first use. `macs` are multiply-accumulates, `bytes` the output's size,
    both for one image.
    """

    name: str
    kind: str
    target: str
    inputs: tuple[str, ...]
    type: TensorType
    params: int = 0
    macs: int = 0
    bytes: int = 0


NORMALIZE = "derc_normalize"
"""Name and target of the operation that normalises the images; what it gives is still an image."""
KINDS = ("call_module", "call_function", "call_method", "get_attr", "block", "stitch", "stem", "head")


@dataclass(frozen=True)
class Tie:
    """A weight, by its path, that several operations work on data with, or a table that dropout draws for them all.

    No cut may part the operations.
    """

    weight: str
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """Operations in topological order, from one image batch to one output; `ties` are its shared weights."""

    name: str
    input: Value
    ops: tuple[Op, ...]
    output: str
    notes: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()

    @cached_property
    def types(self) -> dict[str, TensorType]:
        return {self.input.name: self.input.type} | {op.name: op.type for op in self.ops}

    @cached_property
    def dependent(self) -> frozenset[str]:
        """Names of the values that depend on the input."""
        seen = {self.input.name}
        for op in self.ops:
            if not seen.isdisjoint(op.inputs):
                seen.add(op.name)
        return frozenset(seen)

    @property
    def params(self) -> int:
        return sum(op.params for op in self.ops)

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops)

    def verify(self) -> None:
        """Raise DercError unless every value is defined once, before its use, and the output depends on the input."""
        defined = {self.input.name}
        for op in self.ops:
            if op.kind not in KINDS:
                raise DercError(f"graph {self.name}: op {op.name} has the unknown kind {op.kind!r}")
            if op.name in defined:
                raise DercError(f"graph {self.name}: value {op.name} is defined twice")
            for name in op.inputs:
                if name not in defined:
                    raise DercError(f"graph {self.name}: op {op.name} uses {name} before it is defined")
            defined.add(op.name)
        for tie in self.ties:
            if len(tie.ops) < 2 or not defined.issuperset(tie.ops):
                raise DercError(f"graph {self.name}: the tie of {tie.weight} needs two or more operations of the graph")
        if self.output not in self.dependent:
            raise DercError(f"graph {self.name}: the output {self.output!r} does not depend on the input")

    def networkx(self) -> nx.DiGraph[str]:
        """The input-dependent values as a directed graph, an edge from each operand to its result."""
        view: nx.DiGraph[str] = nx.DiGraph()
        view.add_node(self.input.name)
        for op in self.ops:
            if op.name in self.dependent:
                view.add_edges_from((name, op.name) for name in op.inputs if name in self.dependent)
        return view
