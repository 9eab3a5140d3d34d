"""int8 by static quantisation: weights rounded per channel, activations by ranges that are seen on samples."""

from __future__ import annotations

import io
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import onnx

from derc.artifacts import Array
from derc.errors import MissingDependencyError, UsageError

PRODUCTS = ("Conv", "Gemm", "MatMul")
OPERATORS = (*PRODUCTS, "Add", "Mul", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat")
NORMALISED = ("LayerNormalization", "Softmax", "GroupNormalization", "InstanceNormalization")


@dataclass(frozen=True)
class Int8:
    """How values are rounded; weights are int8, symmetric and per output channel always.

    `biases` rounds biases to int32, which integer kernels want and TensorRT does not take. `attention` rounds products
    of two activations too, `reduced` leaves weights seven bits, so that 16-bit sums of products do not overflow.
    """

    activations: Literal["uint8", "int8"] = "uint8"
    symmetric: bool = False
    method: Literal["minmax", "percentile", "entropy"] = "minmax"
    biases: bool = True
    attention: bool = False
    reduced: bool = False


CPU = Int8()
TENSORRT = Int8(activations="int8", symmetric=True, biases=False)

EXACT = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""Processor flags of instructions that sum products of eight bits in 32; without them x86 sums pairs in 16."""


def for_cpu(root: Path = Path("/")) -> Int8:
    """What suits this processor; `root` is where /proc is found."""
    info = root / "proc/cpuinfo"
    found = re.search(r"^flags\s*:(.+)$", info.read_text(errors="replace") if info.exists() else "", re.MULTILINE)
    return CPU if found is None or EXACT & set(found[1].split()) else replace(CPU, reduced=True)


def operators(model: onnx.ModelProto) -> tuple[str, ...]:
    """What is computed in int8: all that ONNX Runtime has integer kernels for, or products alone in transformers.

    Where values are normalised within the network, what is summed in between has outliers that eight bits do not hold
    (the outputs of untrained ViTs moved by more than half their size), and integer sums gain no time there.
    """
    return PRODUCTS if any(node.op_type in NORMALISED for node in model.graph.node) else OPERATORS


def quantise(model: bytes, samples: Sequence[Array], options: Int8 = CPU) -> bytes:
    """`model` with one float32 input and output, its insides between QuantizeLinear and DequantizeLinear.

    `samples` are inputs of the model's own shape. Equal arguments give equal bytes. Raises UsageError without samples,
    MissingDependencyError without ONNX Runtime, whose quantiser does the work.
    """
    if not samples:
        raise UsageError(
            "int8 needs samples to calibrate by, and there are none: give a probe set of at least one image"
        )
    if find_spec("onnxruntime") is None:
        raise MissingDependencyError('int8 is calibrated with ONNX Runtime, which is absent: pip install "derc[cpu]"')
    with tempfile.TemporaryDirectory(prefix="derc.int8.") as folder, _quiet():
        folded = Path(folder, "folded.onnx")
        _fold(model, folded)
        rounded = Path(folder, "int8.onnx")
        _round(folded, rounded, samples, options)
        made = onnx.load(rounded)
    return _plain(made, onnx.load_from_string(model))


def _fold(model: bytes, path: Path) -> None:
    """Write the model with batch-norms and constants folded, for a convolution is rounded with what follows it."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(path)
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def _round(source: Path, target: Path, samples: Sequence[Array], options: Int8) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    model = onnx.load(source)
    (given,) = model.graph.input

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, Array] | None:
            sample = next(self.left, None)
            return None if sample is None else {given.name: sample}

    quantize_static(
        source,
        target,
        Samples(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(operators(model)),
        per_channel=True,
        reduce_range=options.reduced,
        activation_type=QuantType.QUInt8 if options.activations == "uint8" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, {"minmax": "MinMax"}.get(options.method, options.method.title())),
        extra_options={
            "ActivationSymmetric": options.symmetric,
            "QuantizeBias": options.biases,
            "MatMulConstBOnly": not options.attention,
        },
    )


def _plain(made: onnx.ModelProto, model: onnx.ModelProto) -> bytes:
    """The bytes of `made` with nothing in it of where and when it was made."""
    del made.metadata_props[:]
    made.producer_name, made.producer_version = "derc", ""
    made.ir_version = max(made.ir_version, model.ir_version)
    return bytes(made.SerializeToString(deterministic=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on the root logger, and its progress on standard output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
