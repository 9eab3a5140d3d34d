"""Symbolic tracing with known shapes: torch.fx, where every proxy also carries what it would be at two batch sizes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from derc.blame import check_hooks, here
from derc.errors import UsageError
from derc.mode import MODE, Mode, reads_others_mode
from derc.proxies import BATCHES, Pair, ShapedProxy, is_constant


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
        self.edited: dict[fx.Node, fx.Node] = {}
        self.failed: tuple[str, str] | None = None
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
        """As fx does; training mode becomes a node, and a value that was edited in place is what the edit gave."""
        if isinstance(a, Mode):
            return self.create_node("get_attr", MODE, (), {})
        found = super().create_arg(a)
        while isinstance(found, fx.Node) and found in self.edited:
            found = self.edited[found]
        return found

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        check_hooks(m, path)
        self.times_called[path] += 1
        self.frames.append(_Frame())
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or (path, type(m).__name__)
            raise
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
            node.meta["where"] = here()
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
        tensors = {n: n.meta["pair"][0] for n in node.all_input_nodes if isinstance(n.meta["pair"][0], torch.Tensor)}
        versions = {n: tensor._version for n, tensor in tensors.items()}
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
        for operand, tensor in tensors.items():
            if tensor._version != versions[operand]:
                self._note_edit(operand, node, tensor, first)
        return (first, second), counter.get_total_flops() // 2 // BATCHES[0]

    def _note_edit(self, operand: fx.Node, node: fx.Node, tensor: torch.Tensor, result: Any) -> None:
        """From here on, whoever uses `operand`, which `node` edits in place, uses what `node` gives."""
        whole = isinstance(result, torch.Tensor) and result.shape == tensor.shape
        if not whole or result.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
            raise UsageError("its forward pass edits a value in place by parts; write the result to a new tensor")
        node.meta["edits"] = True
        self.edited[operand] = node

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
