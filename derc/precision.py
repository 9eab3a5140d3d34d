"""A model's insides in another number format, and the proof on samples that nothing overflows there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from derc import halffloat, quantization
from derc.artifacts import Array
from derc.engine import PRECISIONS
from derc.errors import MissingDependencyError, PrecisionError, UsageError, suggest
from derc.quantization import Int8

UNSEEN = ("bf16",)
"""Formats that ONNX Runtime does not compute in on a processor; their range is that of float32."""


def rewrite(model: bytes, precision: str, samples: Sequence[Array], int8: Int8 = quantization.CPU) -> bytes:
    """The ONNX `model` (one float32 input and output, which stay so) computed in `precision`, one of `PRECISIONS`.

    `samples` are inputs of the model's own shape. Raises PrecisionError where a value on them is NaN or beyond the
    format's range, UsageError for an unknown precision and for int8 without samples.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"unknown precision {precision!r}, known: {', '.join(PRECISIONS)}{suggest(precision, PRECISIONS)}"
        )
    if precision == "fp32":
        return model
    limit = halffloat.LIMITS.get(precision, float(np.finfo(np.float32).max))
    check_range(model, samples, limit, precision)
    made = quantization.quantise(model, samples, int8) if precision == "int8" else halffloat.rewrite(model, precision)
    if precision not in UNSEEN:
        check_finite(made, samples, precision)
    return made


def check_range(model: bytes, samples: Sequence[Array], limit: float, precision: str) -> None:
    """Raise PrecisionError where a float value of `model` is NaN or larger than `limit` on one of `samples`."""
    for found in ranges(model, samples):
        for name, (largest, total) in found.items():
            if not np.isfinite(total):
                raise PrecisionError(
                    f"the value {name} is NaN or infinite in fp32 already: leave out the donor, or these images"
                )
            if largest > limit:
                raise PrecisionError(
                    f"the value {name} reaches {largest:.4g} on the probe images, beyond the range of {precision} "
                    f"({limit:.4g}): keep this block fp32, or use bf16"
                )


def check_finite(model: bytes, samples: Sequence[Array], precision: str) -> None:
    """Raise PrecisionError where an output of `model` is not finite: a small divisor may have been rounded to zero."""
    session = _session(model)
    for sample in samples:
        if not np.isfinite(session.run(None, {session.get_inputs()[0].name: sample})[0]).all():
            raise PrecisionError(
                f"the output is NaN or infinite in {precision} and not in fp32: keep this block fp32, or use bf16"
            )


def ranges(model: bytes, samples: Sequence[Array]) -> Iterator[dict[str, tuple[float, float]]]:
    """On each of `samples`, the largest magnitude of each float value of the model, and the sum of its magnitudes.

    The sum tells of NaN, which a maximum may skip. Computed in float32 by ONNX Runtime on the CPU.
    """
    watched, names = _watched(model)
    session = _session(watched)
    for sample in samples:
        found = session.run(None, {session.get_inputs()[0].name: sample})
        yield {name: (float(found[2 * i]), float(found[2 * i + 1])) for i, name in enumerate(names)}


def _watched(model: bytes) -> tuple[bytes, list[str]]:
    """The model with two numbers for outputs, largest and sum of magnitudes, of each float value that it computes."""
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    graph = proto.graph
    infos = (*graph.value_info, *graph.output)
    floats = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
    names = [name for node in graph.node for name in node.output if name in floats]
    del graph.output[:]
    for place, name in enumerate(names):
        graph.node.append(helper.make_node("Abs", [name], [f"abs_{place}"]))
        for kind in ("ReduceMax", "ReduceSum"):
            graph.node.append(helper.make_node(kind, [f"abs_{place}"], [f"{kind}_{place}"], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(f"{kind}_{place}", TensorProto.FLOAT, []))
    return bytes(proto.SerializeToString()), names


def _session(model: bytes) -> Any:
    if find_spec("onnxruntime") is None:
        raise MissingDependencyError(
            'lower precisions are checked with ONNX Runtime, which is absent: pip install "derc[cpu]"'
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def used(model: onnx.ModelProto) -> tuple[str, ...]:
    """The formats that a model is computed in, of `PRECISIONS` and in their order.

    int8 is where values are rounded between QuantizeLinear and DequantizeLinear; float32 where a product, a sum or an
    activation has a float32 result that is not rounded.
    """
    typed = onnx.shape_inference.infer_shapes(model)
    infos = (*typed.graph.value_info, *typed.graph.output)
    kinds = {info.name: info.type.tensor_type.elem_type for info in infos}
    rounded = {name for node in typed.graph.node if node.op_type == "QuantizeLinear" for name in node.input[:1]}
    found = {"int8"} if rounded else set[str]()
    names = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    for node in typed.graph.node:
        if node.op_type not in ("Cast", "QuantizeLinear", "DequantizeLinear", "Identity", "Constant"):
            found |= {names[kinds[name]] for name in node.output if kinds.get(name) in names and name not in rounded}
    return tuple(name for name in PRECISIONS if name in found)
