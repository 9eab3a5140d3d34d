"""Symbolic tracing with known shapes: torch.fx, where every proxy also carries what it would be at two batch sizes."""

from __future__ import annotations

import dis
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from derc.errors import UsageError

BATCHES = (2, 3)
"""What is equal at both batch sizes is a constant; what differs depends on the batch size."""
MODE = "training"
"""The attribute that every module has and graphs may read: whether it is in training mode."""
Pair = tuple[Any, Any]


def is_constant(value: Any) -> bool:
    """Whether a value is plain: numbers, types and devices, or sequences of them, such as the size of a map."""
    if isinstance(value, (tuple, list)):
        return all(is_constant(item) for item in value)
    return isinstance(value, (int, float, torch.dtype, torch.device))


def is_count(node: fx.Node) -> bool:
    """Whether the node is a whole number that depends on the batch size."""
    return type(node.meta.get("pair", (None,))[0]) is int


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


class ModeBranchError(Exception):
    """A module of type `owner` branches on `self.training`."""

    def __init__(self, owner: type) -> None:
        super().__init__(owner.__name__)
        self.owner = owner


@dataclass
class Mode:
    """What `self.training` is while tracing: an argument for dropout and its like, but no branch may hang on it.

    `binding` is False where eval mode's branch is taken for good; `asked` tells whether one was.
    """

    owner: type
    binding: bool = True
    asked: bool = False

    def __bool__(self) -> bool:
        if self.binding:
            raise ModeBranchError(self.owner)
        self.asked = True
        return False


def reads_others_mode(kind: type) -> bool:
    """Whether the code of a module type reads `training` of anything but self, which tracing would freeze."""
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(owner).items():
            code = getattr(_written(function), "__code__", None)
            if code is not None and name not in ("__init__", "train", "eval") and _reads_others_mode(code):
                return True
    return False


@cache
def _reads_others_mode(code: CodeType) -> bool:
    before = None
    for instruction in dis.get_instructions(code):
        reads = instruction.opname == "LOAD_ATTR" and instruction.argval == "training"
        if reads and (before is None or before.argval != "self"):
            return True
        before = instruction
    return False


def _written(function: Any) -> Any:
    """The function inside transformers' decorators, which ask for `self.training` only to checkpoint gradients."""
    while getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers."):
        if not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    return function


@contextmanager
def sizes_in_lists() -> Iterator[None]:
    """Inside, ``x.expand(n, 3)`` is ``x.expand((n, 3))``: only there does torch take a proxy for a size."""
    methods = ("expand", "view", "reshape", "repeat", "tile", "new_zeros")
    places: list[tuple[Any, str, int]] = [(torch.Tensor, name, 1) for name in methods]
    places += [(torch, name, 0) for name in ("zeros", "ones", "empty", "rand", "randn")]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    for owner, name, receivers in places:
        setattr(owner, name, _in_list(getattr(owner, name), receivers))
    try:
        yield
    finally:
        for owner, name, function in before:
            if function is None:
                delattr(owner, name)
            else:
                setattr(owner, name, function)


def _in_list(function: Any, receivers: int) -> Any:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        sizes = args[receivers:]
        known = not any(isinstance(receiver, fx.Proxy) for receiver in args[:receivers])
        if known and any(isinstance(size, fx.Proxy) for size in sizes):
            return function(*args[:receivers], sizes, **kwargs)
        return function(*args, **kwargs)

    return call


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
    """Traces a module for images of one shape; modules of the types in `whole` are not looked into.

    Where the network itself is in `whole`, its branches on `self.training` are those of eval mode.
    """

    def __init__(self, input_shape: tuple[int, int, int], whole: frozenset[type] = frozenset()) -> None:
        from timm.models._features_fx import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=False)
        self.leaves = tuple(get_notrace_modules())
        self.whole = whole
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
        """torch's modules, timm's opaque ones, modules without children, and those of the types in `whole`."""
        if isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        childless = next(m.children(), None) is None
        opaque = isinstance(m, self.leaves) or type(m) in self.whole or reads_others_mode(type(m))
        return super().is_leaf_module(m, module_qualified_name) or childless or opaque

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._hide_mode(root, root=True)
        with sizes_in_lists():
            return super().trace(root, concrete_args)

    def _hide_mode(self, module: nn.Module, *, root: bool = False) -> None:
        """Put a Mode in the place of `training` wherever the tracer looks into a module."""
        if root or not self.is_leaf_module(module, ""):
            module.training = Mode(type(module), binding=not root or type(module) not in self.whole)  # type: ignore[assignment]
            for child in module.children():
                self._hide_mode(child)

    def create_arg(self, a: Any) -> Any:
        return self.create_node("get_attr", MODE, (), {}) if isinstance(a, Mode) else super().create_arg(a)

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
        if is_constant(first) and is_constant(second) and first == second:
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
                return False if target == MODE else operator.attrgetter(target)(self.root)
            case _:
                return target(*args, **kwargs)
