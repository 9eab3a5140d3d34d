"""Running an ONNX model on the CPU: ONNX Runtime where it is installed, else onnx's own reference."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx

from derc.artifacts import Array

Run = Callable[[dict[str, Array]], list[Array]]


def runner(model: onnx.ModelProto) -> Run:
    """What maps inputs by name to the model's outputs in order; raises the runtime's errors."""
    if find_spec("onnxruntime") is None:
        return _reference(model)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Array]) -> list[Array]:
        found: list[Any] = session.run(None, inputs)
        return [np.asarray(value) for value in found]

    return run


def _reference(model: onnx.ModelProto) -> Run:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)

    def run(inputs: dict[str, Array]) -> list[Array]:
        found: Any = evaluator.run(None, inputs)
        return [np.asarray(value) for value in found]

    return run
