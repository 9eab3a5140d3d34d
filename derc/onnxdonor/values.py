"""Operators of an ONNX file, and the values that do not depend on the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import fx

from derc.artifacts import Array

FACTORS = (1, 2, 3)
"""Values are followed at these multiples of the file's batch size; it is free in what differs in proportion."""
LARGEST_SHAPE = 64
"""An array that depends on the batch size and has more elements than this is no shape."""


class UnsupportedError(Exception):
    """A form of an operator that the table does not know."""


@dataclass(frozen=True)
class Known:
    """A value that does not depend on the images: one array for each of FACTORS.

    `weight` names the initializer that a floating-point one is from, `source` is the tensor whose shape one is from.
    """

    arrays: tuple[Array, ...]
    weight: str = ""
    source: fx.Node | None = None

    @classmethod
    def constant(cls, array: Array, weight: str = "") -> Known:
        return cls((array,) * len(FACTORS), weight)

    @property
    def fixed(self) -> bool:
        """Whether it is the same for every batch size."""
        first = self.arrays[0]
        return all(a is first or (a.shape == first.shape and np.array_equal(a, first)) for a in self.arrays[1:])


@dataclass(frozen=True)
class Operator:
    """One node of the file and the version of its operator set."""

    node: onnx.NodeProto
    version: int

    @property
    def kind(self) -> str:
        """Its type, after its domain where that is not the default one."""
        domain = "" if self.node.domain in ("", "ai.onnx") else f"{self.node.domain}::"
        return f"{domain}{self.node.op_type}"

    def __str__(self) -> str:
        return f"{self.kind} ({self.node.name})" if self.node.name else self.kind

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute; floats are the shortest decimal that float32 rounds to the stored value."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                return _plain(onnx.helper.get_attribute_value(attribute))
        return default


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, float):
        return short(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def floating(array: Array) -> bool:
    """Whether the numbers are floating-point, also of the type bfloat16 that numpy does not know."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def as_tensor(array: Array) -> torch.Tensor:
    """A copy of the array in torch's type of the same name; raises TypeError where there is none."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def short(value: float) -> float:
    """The shortest decimal that float32 rounds to the same number."""
    return float(str(np.float32(value)))


def _alone(op: Operator, inputs: Mapping[str, Known], opsets: Mapping[str, int]) -> onnx.ModelProto:
    """A model of the one operator, in the version that the file has it in."""
    graph = onnx.GraphProto(name=op.kind, node=[op.node])
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in inputs)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in op.node.output if name)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return onnx.helper.make_model(graph, opset_imports=imports)


def folded(op: Operator, inputs: Mapping[str, Known], opsets: Mapping[str, int]) -> list[Known] | None:
    """What an operator makes of constants; None where it is no number, or its size depends on the batch's."""
    try:
        evaluator = ReferenceEvaluator(_alone(op, inputs, opsets))
        fixed = all(value.fixed for value in inputs.values())
        runs: list[Any] = []
        for which in range(1 if fixed else len(FACTORS)):
            runs.append(evaluator.run(None, {name: value.arrays[which] for name, value in inputs.items()}))
    except Exception:  # noqa: BLE001  the reference lacks operators, and says so in many ways
        return None
    weight = next((value.weight for value in inputs.values() if value.weight), "")
    source = next((value.source for value in inputs.values() if value.source is not None), None)
    found = []
    for arrays in zip(*(runs * len(FACTORS) if fixed else runs), strict=True):
        arrays = tuple(np.asarray(array) for array in arrays)
        value = Known(arrays, weight if floating(arrays[0]) else "", source)
        if not value.fixed and (arrays[0].ndim > 1 or arrays[0].size > LARGEST_SHAPE or value.weight):
            return None
        found.append(value)
    return found
