"""Building a torch.fx graph from ONNX operators: every value with its shape at three batch sizes, constants folded.

A shape that is written into the file for one batch size is made free again by what it is at two others.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from derc.artifacts import Array
from derc.errors import UsageError
from derc.onnxdonor.file import OnnxFile
from derc.onnxdonor.values import FACTORS, Known, Operator, UnsupportedError, as_tensor, floating, short

Value = Known | fx.Node
Size = int | fx.Node


class Builder:
    """A torch network on its way; operators are added by `derc.onnxdonor.network.convert`.

    `size` is the input's shape behind its first axis. With `fixed` the network is for the file's own sizes alone, else
    for any number of images.
    """

    def __init__(self, file: OnnxFile, size: tuple[int, ...], *, fixed: bool = False) -> None:
        self.file = file
        self.free = fixed or file.shape[0] is None
        self.batch = file.shape[0] or 1
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.images = self.graph.placeholder("x")
        factors = (1,) * len(FACTORS) if fixed else FACTORS
        with self.fake:
            self.images.meta["values"] = tuple(torch.empty(self.batch * factor, *size) for factor in factors)
        self.values: dict[str, Value] = {file.input: self.images}
        self.weights = {tensor.name: tensor for tensor in file.model.graph.initializer}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in file.model.graph.node:
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)
        self.leaves: set[str] = set()

    # what a value is

    def value(self, name: str) -> Value:
        """The value called `name`, an initializer read on first use."""
        if name not in self.values:
            array = onnx.numpy_helper.to_array(self.weights[name])
            self.values[name] = Known.constant(array, name if floating(array) else "")
        return self.values[name]

    def given(self, op: Operator, index: int) -> bool:
        """Whether the operator has an input at `index`."""
        return index < len(op.node.input) and op.node.input[index] != ""

    def known(self, op: Operator, index: int) -> Known:
        """An input that must not depend on the images."""
        found = self.value(op.node.input[index])
        if not isinstance(found, Known):
            raise UnsupportedError(f"{op} computes its input {index} from the images")
        return found

    def array(self, op: Operator, index: int, default: Any = None) -> Array:
        """An input that must be constant, or `default` where it is not given."""
        if not self.given(op, index):
            return np.asarray(default)
        found = self.known(op, index)
        if not found.fixed:
            raise UnsupportedError(f"{op} depends on the batch size at input {index}")
        return found.arrays[0]

    def integers(self, op: Operator, name: str, index: int | None = None) -> list[int] | None:
        """Whole numbers from an attribute, or in newer versions from a constant input; None where neither is given."""
        found = op.get(name)
        if found is None and index is not None and self.given(op, index):
            found = self.array(op, index).reshape(-1).tolist()
        return None if found is None else [int(item) for item in found]

    def tensor(self, op: Operator, index: int) -> fx.Node:
        """An input as a node of the graph; a constant becomes a parameter or buffer of the network.

        Each use has its own: exporters keep equal constants once, which does not mean that a weight is shared.
        """
        name = op.node.input[index]
        found = self.value(name)
        if isinstance(found, fx.Node):
            return found
        if not found.fixed:
            raise UnsupportedError(f"{op} depends on the batch size at input {index}")
        return self.attribute(found.weight or name, found.arrays[0], trained=bool(found.weight))

    def operand(self, op: Operator, index: int) -> Any:
        """An input as `tensor` gives it, but a plain number where it is one and no weight.

        An initializer is taken for a weight where it has an axis and is used once.
        """
        name = op.node.input[index]
        found = self.value(name)
        if not isinstance(found, Known) or not found.fixed or found.arrays[0].size != 1 or found.arrays[0].ndim > 1:
            return self.tensor(op, index)
        if found.weight and found.arrays[0].ndim and len(self.users[name]) == 1:
            return self.tensor(op, index)
        number = found.arrays[0].reshape(()).item()
        return short(number) if isinstance(number, float) else number

    # shapes

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """The tensor's shape for each of FACTORS."""
        return [tuple(value.shape) for value in node.meta["values"]]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The tensor's shape at the file's batch size."""
        return self.shapes(node)[0]

    def rank(self, node: fx.Node) -> int:
        return len(self.shape(node))

    def varying(self, node: fx.Node) -> list[int]:
        """Axes whose size depends on the batch size."""
        return [axis for axis, sizes in enumerate(zip(*self.shapes(node), strict=True)) if len(set(sizes)) > 1]

    def sizes(self, dims: Sequence[Sequence[int]], source: fx.Node | None = None) -> list[Size]:
        """Sizes given for each of FACTORS as numbers, or as multiples of the batch size, which `source` tells."""
        return [self.count(list(sizes), source or self.images) for sizes in zip(*dims, strict=True)]

    def count(self, sizes: list[int], source: fx.Node) -> Size:
        """One size, given for each of FACTORS; asked of a tensor near by, so that it ties no distant parts together."""
        if len(set(sizes)) == 1:
            return int(sizes[0])
        if any(size != sizes[0] * factor for size, factor in zip(sizes, FACTORS, strict=True)):
            raise UnsupportedError("a size is not in proportion to the batch size")
        axis = next(iter(self.varying(source)), 0)
        found, own = self.method("size", source, axis), self.shape(source)[axis]
        if sizes[0] != own:
            found = self.call(operator.floordiv, self.call(operator.mul, found, int(sizes[0])), own)
        return found

    # what the network does

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._add("call_function", function, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._add("call_method", name, args, kwargs)

    def module(self, hint: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        """A call of a new submodule whose path is near `hint`."""
        return self._add("call_module", self._place(hint, module.eval()), args, {})

    def attribute(self, hint: str, array: Array, *, trained: bool) -> fx.Node:
        """A new parameter, or buffer, whose path is near `hint`."""
        value = as_tensor(array)
        return self._add("get_attr", self._place(hint, nn.Parameter(value) if trained else value), (), {})

    def _add(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        values = []
        with torch.no_grad(), self.fake:
            for which in range(len(FACTORS)):
                values.append(self._run(kind, target, args, kwargs, which))
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta["values"] = tuple(values)
        self._inherit(node)
        return node

    def _inherit(self, node: fx.Node) -> None:
        """Note where the images lie inside of an axis, as an operand of the same axis does."""
        for operand in node.all_input_nodes:
            inner = operand.meta.get("inner", 1)
            if inner > 1 and isinstance(node.meta["values"][0], torch.Tensor):
                sizes = [self._varying_sizes(value) for value in (operand, node)]
                if sizes[0] == sizes[1]:
                    node.meta["inner"] = inner

    def _varying_sizes(self, node: fx.Node) -> list[list[int]]:
        return [[shape[axis] for shape in self.shapes(node)] for axis in self.varying(node)]

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any, which: int) -> Any:
        args = fx.node.map_arg(args, lambda node: node.meta["values"][which])
        kwargs = fx.node.map_arg(kwargs, lambda node: node.meta["values"][which])
        match kind:
            case "call_module":
                return self.root.get_submodule(target)(*args)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            case "get_attr":
                return operator.attrgetter(target)(self.root).detach()
        return target(*args, **kwargs)

    def _place(self, hint: str, value: nn.Module | torch.Tensor) -> str:
        """Put a module, parameter or buffer into the network; returns its path."""
        path = self._path(hint)
        self.leaves.add(path)
        *owners, name = path.split(".")
        owner = self.root
        for part in owners:
            if not hasattr(owner, part):
                setattr(owner, part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(value, (nn.Module, nn.Parameter)):
            setattr(owner, name, value)
        else:
            owner.register_buffer(name, value)
        return path

    def _path(self, hint: str) -> str:
        """A dotted path like `hint` that is free, and below which and above which nothing lies."""
        parts = [part for part in re.sub(r"[^\w.]+", "_", hint).split(".") if part.strip("_")] or ["constant"]
        path = ".".join(f"{part}_" if hasattr(fx.GraphModule, part) or part == "training" else part for part in parts)
        path = f"part{path}" if path[0].isdigit() else path
        if not self.leaves.isdisjoint(_above(path)):
            path = path.replace(".", "_")
        found, number = path, 0
        while self._taken(found):
            number += 1
            found = f"{path}_{number}"
        return found

    def _taken(self, path: str) -> bool:
        flat = path.replace(".", "_")
        return any(leaf.startswith(f"{path}.") or leaf.replace(".", "_") == flat for leaf in self.leaves)


def _above(path: str) -> set[str]:
    """The dotted paths that contain `path`."""
    parts = path.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def check_batch(builder: Builder, op: Operator, node: fx.Node, axes: Sequence[int]) -> None:
    """Raise UsageError where one of `axes` is the images' own."""
    rank = builder.rank(node)
    if {axis % rank for axis in axes} & set(builder.varying(node)):
        raise UsageError(f"{op} works across the images of a batch: export the network with a free batch axis")
