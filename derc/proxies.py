"""Proxies that know their shape: what stands for a value while a network is traced, at two batch sizes at once."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from derc.errors import UsageError

BATCHES = (2, 3)
"""What is equal at both batch sizes is a constant; what differs depends on the batch size."""
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
