"""ONNX models made by hand for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOAT = onnx.TensorProto.FLOAT


def model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Any] | None = None,
    *,
    shape: tuple[Any, ...] = ("n", 4, 6, 6),
    opset: int = 18,
    outputs: tuple[str, ...] = ("y",),
    inputs: tuple[str, ...] = ("x",),
    domains: dict[str, int] | None = None,
    element: int = FLOAT,
    result: tuple[Any, ...] | None = None,
) -> onnx.ModelProto:
    """A model from `x` to `y`, of the shape `result` where ONNX cannot tell it."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, element, shape) for name in inputs],
        [helper.make_tensor_value_info(name, element, result) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(name, version) for name, version in (domains or {}).items()]
    made = helper.make_model(graph, opset_imports=imports, ir_version=8)
    if result is None:
        made = onnx.shape_inference.infer_shapes(made)
    for output in made.graph.output:
        if not output.type.tensor_type.HasField("shape"):
            output.CopyFrom(helper.make_tensor_value_info(output.name, FLOAT, ("a", "b", "c", "d")))
    return made


def saved(proto: onnx.ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    path = folder / name
    onnx.save(proto, str(path))
    return path


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(*values: int) -> Any:
    return np.array(values, np.int64)
