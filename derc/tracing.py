"""Symbolic tracing with known shapes: torch.fx, where every proxy also carries what it would be at two batch sizes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from derc.errors import UsageError

BATCHES = (2, 3)
"""What is equal at both batch sizes is a constant; what differs depends on the batch size."""
Pair = tuple[Any, Any]


def is_count(node: fx.Node) -> bool:
    """Whether the node is a whole number that depends on the batch size."""
    return isinstance(node.meta.get("pair", (None,))[0], int)


def is_batched(node: fx.Node) -> bool:
    """Whether the node is a tensor whose first axis is proportional to the batch size."""
    small, large = node.meta.get("pair", (None, None))
    if not isinstance(small, torch.Tensor) or small.dim() == 0:
        return False
    return bool(small.shape[0] * BATCHES[1] == large.shape[0] * BATCHES[0])


class ShapedProxy(fx.Proxy):
    """A proxy that answers questions of shape and type at trace time."""

    @property
    def pair(self) -> Pair:
        pair: Pair = self.node.meta["pair"]
        return pair

    def _tensor(self) -> bool:
        return isinstance(self.pair[0], torch.Tensor)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout") and self._tensor():
            return self.size() if name == "shape" else getattr(self.pair[0], name)
        return super().__getattr__(name)

    def size(self, dim: int | None = None) -> Any:
        """torch.Tensor.size, constants where they do not depend on the batch size."""
        small, large = self.pair
        if dim is None:
            return tuple(self.size(axis) for axis in range(small.dim()))
        if small.shape[dim] == large.shape[dim]:
            return small.shape[dim]
        return self.tracer.create_proxy("call_method", "size", (self, dim % small.dim()), {})

    def dim(self) -> int:
        return int(self.pair[0].dim())

    def numel(self) -> Any:
        total: Any = 1
        for size in self.size():
            total = total * size
        return total

    def is_floating_point(self) -> bool:
        return bool(self.pair[0].is_floating_point())

    def __len__(self) -> int:
        if self._tensor():
            return int(self.size(0))
        return len(self.pair[0])

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])

    def __bool__(self) -> bool:
        if isinstance(self.pair[0], torch.Tensor):
            raise UsageError("its forward pass branches on the data; wrap it so that the branch is fixed")
        if bool(self.pair[0]) != bool(self.pair[1]):
            raise UsageError("its forward pass branches on the batch size; wrap it so that the branch is fixed")
        return bool(self.pair[0])

    def _number(self) -> Any:
        if self._tensor():
            raise UsageError("its forward pass turns data into a number and so depends on the data")
        if self.pair[0] != self.pair[1]:
            raise UsageError("its forward pass needs the batch size as a constant")
        return self.pair[0]

    def __int__(self) -> int:
        return int(self._number())

    def __index__(self) -> int:
        return operator.index(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def item(self) -> Any:
        return self._number()

    def tolist(self) -> Any:
        return self._number()


@dataclass(frozen=True)
class Record:
    """A submodule call with one tensor in and one tensor out."""

    path: str
    argument: str
    result: str
    members: tuple[str, ...]


@dataclass
class _Frame:
    members: list[str] = field(default_factory=list)


class ShapeTracer(fx.Tracer):
    """Traces a module for images of one shape; what tracing would change in training stays whole."""

    def __init__(self, input_shape: tuple[int, int, int]) -> None:
        from timm.models._features_fx import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=False)
        self.leaves = tuple(get_notrace_modules())
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.images = tuple(torch.empty(batch, *input_shape) for batch in BATCHES)
        self.records: list[Record] = []
        self.times_called: Counter[str] = Counter()
        self.frames: list[_Frame] = []
        self.evaluating = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ShapedProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's modules, timm's opaque ones, modules without children, and those that read `self.training`."""
        if isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        childless = next(m.children(), None) is None
        return super().is_leaf_module(m, module_qualified_name) or isinstance(m, self.leaves) or childless or _trains(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.times_called[path] += 1
        self.frames.append(_Frame())
        result = super().call_module(m, forward, args, kwargs)
        frame = self.frames.pop()
        if self.frames:
            self.frames[-1].members.extend(frame.members)
        single = len(args) == 1 and not kwargs and isinstance(args[0], fx.Proxy) and isinstance(result, fx.Proxy)
        if single and result.node.name in frame.members:
            self.records.append(Record(path, args[0].node.name, result.node.name, tuple(frame.members)))
        return result

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The images alone; every other argument of the forward pass keeps its default."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        if kind == "placeholder":
            node.meta["pair"] = self.images
        elif kind != "output":
            node.meta["pair"], node.meta["macs"] = self._evaluate(node)
            if self.frames:
                self.frames[-1].members.append(node.name)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        first, second = proxy.node.meta.get("pair", (None, None))
        if isinstance(first, (int, float, bool, torch.dtype, torch.device)) and first == second:
            self.graph.erase_node(proxy.node)
            return first
        return proxy

    def _evaluate(self, node: fx.Node) -> tuple[Pair, int]:
        """What the node gives at both batch sizes, and its multiply-accumulates for one image."""
        counter = FlopCounterMode(display=False)
        self.evaluating = True
        try:
            with torch.no_grad(), self.fake:
                with counter:
                    first = self._run(node, 0)
                second = self._run(node, 1)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UsageError(f"its forward pass depends on the data (at {node.target})") from error
        finally:
            self.evaluating = False
        return (first, second), counter.get_total_flops() // 2 // BATCHES[0]

    def _run(self, node: fx.Node, which: int) -> Any:
        args = fx.node.map_arg(node.args, lambda n: n.meta["pair"][which])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["pair"][which])
        target: Any = node.target
        match node.op:
            case "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            case "get_attr":
                return operator.attrgetter(target)(self.root)
            case _:
                return target(*args, **kwargs)


def _trains(module: nn.Module) -> bool:
    """Whether the module's own code reads `self.training`."""
    for owner in type(module).__mro__:
        if owner is nn.Module:
            return False
        for name, function in vars(owner).items():
            code = getattr(_written(function), "__code__", None)
            if code is not None and name not in ("train", "eval") and "training" in code.co_names:
                return True
    return False


def _written(function: Any) -> Any:
    """The function inside transformers' decorators, which ask for `self.training` only to checkpoint gradients."""
    while getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers."):
        if not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    return function
