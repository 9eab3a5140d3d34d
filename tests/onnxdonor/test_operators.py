"""Every operator of the table gives what ONNX's own reference gives, on random shapes, at every batch size."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from derc.onnxdonor.network import build, opaque_nodes
from derc.onnxdonor.tables import OPERATORS
from tests.onnxdonor.models import integers, model, normal, saved

ONE = np.float32(1.0)
RUNTIME = {
    "Softmax": 11,
    "LogSoftmax": 11,
    "LpNormalization": 18,
    "LRN": 18,
    "BatchNormalization": 13,
    "ConvTranspose": 18,
}
"""Operators, and their version, that the reference computes wrongly (onnx 1.23): ONNX Runtime is the oracle."""


def shape_of(seed: int) -> tuple[int, int, int]:
    """A random (C, H, W): 4 or 8 channels, sides from 6 to 9."""
    random = np.random.default_rng(seed)
    return int(random.choice([4, 8])), int(random.integers(3, 5)) * 2, int(random.integers(6, 10))


def case(
    kind: str,
    weights: Any = None,
    *,
    before: tuple[Any, ...] = (),
    opset: int = 18,
    outputs: int = 1,
    **attributes: Any,
):
    """One operator on `x`, whose further inputs are `weights`, maybe functions of (C, H, W); `before` prepares x."""
    return kind, weights or {}, before, opset, outputs, attributes


def conv(seed: int, out: int, groups: int, *kernel: int) -> Any:
    return lambda c, h, w: normal(seed, out, c // groups, *kernel)


def transposed(groups: int, *kernel: int) -> Any:
    return lambda c, h, w: normal(3, c, 6 // groups, *kernel)


def channels(seed: int, positive: bool = False) -> Any:
    return lambda c, h, w: abs(normal(seed, c)) + 0.5 if positive else normal(seed, c)


NORM = {"s": channels(1), "b": channels(2)}
STATS = {**NORM, "m": channels(3), "v": channels(4, True)}
POSITIVE = (("Exp", {}),)
SMALL = (("Tanh", {}),)
BOOLEAN = (("Greater", {"zero": np.float32(0)}),)
ROWS = (("Reshape", {"rows": integers(0, 0, -1)}),)
CASES = [
    *(case(kind) for kind in ("Abs", "Atan", "Ceil", "Cos", "Erf", "Exp", "Floor", "IsNaN", "Neg", "Reciprocal")),
    *(case(kind) for kind in ("Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tan", "Tanh")),
    *(case(kind) for kind in ("Mish", "HardSwish", "Identity", "Asinh", "Sinh", "Cosh")),
    *(case(kind, before=SMALL) for kind in ("Acos", "Asin", "Atanh")),
    *(case(kind, before=POSITIVE) for kind in ("Log", "Sqrt")),
    case("Acosh", before=(("Exp", {}), ("Add", {"one": ONE}))),
    case("Not", before=BOOLEAN),
    case("And", {"w": np.array(True)}, before=BOOLEAN),
    case("Or", {"w": np.array(False)}, before=BOOLEAN),
    case("Xor", {"w": np.array(True)}, before=BOOLEAN),
    *(case(kind, {"w": lambda c, h, w: normal(5, c, 1, 1)}) for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *(case(kind, {"w": np.float32(0.3)}) for kind in ("Add", "Sub", "Mul", "Div", "Equal", "Greater", "Less")),
    *(case(kind, {"w": lambda c, h, w: normal(5, w)}) for kind in ("GreaterOrEqual", "LessOrEqual", "Sum", "Mean")),
    case("Mod", {"w": np.float32(0.7)}, fmod=1),
    case("Pow", {"w": np.float32(2)}),
    case("Pow", {"w": lambda c, h, w: abs(normal(1, c, 1, 1))}, before=POSITIVE),
    case("Cast", to=7),
    case("Cast", to=9),
    case("Where", {"a": lambda c, h, w: normal(1, w), "z": np.float32(0.5)}, before=BOOLEAN),
    case("Clip", {"low": np.float32(-0.4), "high": np.float32(0.6)}),
    case("Clip", {"": None, "high": np.float32(0.6)}),
    case("Clip", opset=9, min=-0.3, max=0.7),
    case("LeakyRelu", alpha=0.2),
    case("Elu", alpha=0.7),
    case("Celu", alpha=0.7),
    case("Selu"),
    case("HardSigmoid"),
    case("HardSigmoid", alpha=1 / 6, beta=0.5),
    case("ThresholdedRelu", alpha=0.4),
    case("Gelu", opset=20),
    case("Gelu", opset=20, approximate="tanh"),
    case("PRelu", {"w": lambda c, h, w: normal(1, c, 1, 1)}),
    case("PRelu", {"w": np.array([0.2], np.float32)}),
    case("PRelu", {"w": lambda c, h, w: normal(1, w)}),
    case("Softmax"),
    case("Softmax", axis=1),
    case("Softmax", opset=11),
    case("LogSoftmax", opset=11, axis=2),
    case("LogSoftmax", axis=-2),
    *(case(kind, {"axes": integers(2, 3)}) for kind in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum")),
    *(
        case(kind, {"axes": integers(-1)}, keepdims=0)
        for kind in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd")
    ),
    *(case(kind, opset=11, axes=[1, -1]) for kind in ("ReduceMean", "ReduceSum", "ReduceLogSumExp")),
    case("ReduceLogSum", {"axes": integers(1)}, before=POSITIVE),
    case("ArgMax", axis=1),
    case("ArgMin", axis=-1, keepdims=0),
    case("LpNormalization", axis=1, p=2),
    case("LpNormalization", axis=-1, p=1),
    case("CumSum", {"axis": np.array(2)}),
    case("Einsum", {"w": lambda c, h, w: normal(1, c, 5)}, equation="nchw,cd->ndhw"),
    case("Reshape", {"shape": integers(0, -1)}),
    case(
        "Reshape",
        {"shape": integers(-1, 2, 2, 1)},
        before=(
            ("ReduceMax", {"axes": integers(2, 3)}),
            ("Slice", {"a": integers(0), "b": integers(4), "c": integers(1)}),
        ),
    ),
    case("Flatten"),
    case("Transpose", perm=[0, 2, 3, 1]),
    case("Squeeze", {"axes": integers(2, -1)}, before=(("GlobalAveragePool", {}),)),
    case("Squeeze", opset=11, axes=[3], before=(("GlobalMaxPool", {}),)),
    case("Unsqueeze", {"axes": integers(1, -1)}),
    case("Unsqueeze", opset=11, axes=[2]),
    case("Split", outputs=2, num_outputs=2, axis=3),
    case(
        "Split",
        {"split": integers(1, 3)},
        outputs=2,
        axis=1,
        before=(("Slice", {"a": integers(0), "b": integers(4), "c": integers(1)}),),
    ),
    case("Split", opset=11, outputs=2, axis=2),
    case("Slice", {"a": integers(1, -3), "b": integers(-1, 99), "axes": integers(2, 3)}),
    case("Slice", {"a": integers(0), "b": integers(2**62), "axes": integers(-1), "steps": integers(2)}),
    case("Slice", {"a": integers(-1), "b": integers(-(2**62)), "axes": integers(2), "steps": integers(-1)}),
    case("Slice", {"a": integers(0, 1), "b": integers(2**62, 3)}),
    case("Slice", opset=9, starts=[1, 0], ends=[3, -1], axes=[1, 2]),
    case("Gather", {"i": np.array(-1)}, axis=2),
    case("Gather", {"i": integers(2, 0, 1)}, axis=1),
    case("Gather", {"i": integers(2, 0, 1, 3).reshape(2, 2)}, axis=-1),
    case("Expand", {"shape": lambda c, h, w: integers(1, c, h, w)}, before=(("ReduceMax", {"axes": integers(1)}),)),
    case("Tile", {"r": integers(1, 2, 1, 3)}),
    case("Trilu"),
    case("Trilu", {"k": np.array(1)}, upper=0),
    case("Pad", {"p": integers(0, 0, 1, 2, 0, 0, 3, 0)}),
    case("Pad", {"p": integers(0, 1, 0, 2, 0, 0, 3, 1), "v": np.float32(0.5)}),
    case("Pad", {"p": integers(0, 0, 1, 2, 0, 0, 2, 1)}, mode="reflect"),
    case("Pad", {"p": integers(1, 2, 2, 1), "": None, "axes": integers(2, 3)}, mode="edge"),
    case("Pad", {"p": integers(1, 2), "v": np.float32(1), "axes": integers(-1)}),
    case("Pad", opset=9, pads=[0, 0, 1, 1, 0, 0, 0, 2], value=0.25),
    case("DepthToSpace", blocksize=2),
    case("DepthToSpace", blocksize=2, mode="CRD"),
    case("SpaceToDepth", blocksize=2, before=(("Slice", {"a": integers(0), "b": integers(6), "c": integers(3)}),)),
    case(
        "Resize",
        {"": None, "s": np.array([1, 1, 2, 2], np.float32)},
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    case("Resize", {"": None, "s": np.array([1, 1, 1.5, 0.75], np.float32)}),
    case("Resize", {"": None, " ": None, "z": lambda c, h, w: integers(1, c, 5, 13)}, nearest_mode="ceil"),
    case("Resize", {"": None, "s": np.array([1, 1, 3, 2], np.float32)}, coordinate_transformation_mode="align_corners"),
    case("Resize", {"": None, "s": np.array([1, 1, 2, 3], np.float32)}, mode="linear"),
    case(
        "Resize",
        {"": None, " ": None, "z": lambda c, h, w: integers(1, c, h * 2, w)},
        mode="linear",
        coordinate_transformation_mode="pytorch_half_pixel",
    ),
    case("Resize", {"": None, "s": np.array([1, 1, 2, 2], np.float32)}, mode="cubic"),
    case(
        "Resize",
        {"": None, " ": None, "z": lambda c, h, w: integers(1, c, 11, 5)},
        mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    case("Upsample", {"s": np.array([1, 1, 2, 2], np.float32)}, opset=9),
    case("Conv", {"w": conv(1, 6, 1, 3, 3), "b": normal(2, 6)}, pads=[1, 1, 1, 1]),
    case("Conv", {"w": conv(1, 6, 1, 3, 2)}, pads=[0, 1, 2, 1], strides=[2, 1]),
    case("Conv", {"w": conv(1, 8, 2, 3, 3), "b": normal(2, 8)}, group=2, dilations=[2, 1], pads=[2, 1, 2, 1]),
    *(
        case("Conv", {"w": conv(1, 6, 1, 3, 4)}, auto_pad=mode, strides=[2, 2])
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    case("Conv", {"w": conv(1, 6, 1, 3), "b": normal(2, 6)}, before=ROWS, pads=[1, 1]),
    case("ConvTranspose", {"w": transposed(1, 3, 3), "b": normal(2, 6)}, strides=[2, 2], pads=[1, 1, 1, 1]),
    case(
        "ConvTranspose", {"w": transposed(2, 3, 2)}, group=2, strides=[2, 1], output_padding=[1, 0], pads=[0, 0, 1, 1]
    ),
    *(
        case("MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=pads)
        for pads in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 2, 0])
    ),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    case("MaxPool", kernel_shape=[2, 2], dilations=[2, 1]),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    case("AveragePool", kernel_shape=[3, 2], pads=[0, 0, 2, 1]),
    case("AveragePool", kernel_shape=[3, 2], pads=[0, 0, 2, 1], count_include_pad=1),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER"),
    case("GlobalAveragePool"),
    case("GlobalMaxPool"),
    case(
        "Gemm",
        {"w": normal(1, 5, 4), "b": normal(2, 5)},
        before=(
            ("Slice", {"a": integers(0), "b": integers(4), "c": integers(1)}),
            ("ReduceMax", {"axes": integers(2, 3)}),
            ("Flatten", {}),
        ),
        transB=1,
    ),
    case(
        "Gemm",
        {"w": normal(1, 4, 5), "b": normal(2, 1, 5)},
        before=(
            ("Slice", {"a": integers(0), "b": integers(4), "c": integers(1)}),
            ("ReduceMax", {"axes": integers(2, 3)}),
            ("Flatten", {}),
        ),
        alpha=0.3,
        beta=1.7,
    ),
    case("MatMul", {"w": lambda c, h, w: normal(1, w, 5)}),
    case("MatMul", {"w": lambda c, h, w: normal(1, c, w, 5)}),
    case("BatchNormalization", STATS, epsilon=1e-3),
    case("BatchNormalization", STATS, before=ROWS, opset=13),
    case("LayerNormalization", {"s": lambda c, h, w: normal(1, w), "b": lambda c, h, w: normal(2, w)}),
    case("LayerNormalization", {"s": lambda c, h, w: normal(1, h, w)}, axis=2, epsilon=1e-3),
    case("GroupNormalization", NORM, opset=21, num_groups=2),
    case("InstanceNormalization", NORM),
    case("InstanceNormalization", NORM, before=ROWS),
    case("LRN", size=3, alpha=0.1, beta=0.6, bias=1.5),
    case("Dropout"),
]


def proto(description: Any, seed: int, batch: Any) -> Any:
    kind, weights, before, opset, count, attributes = description
    c, h, w = shape_of(seed)
    nodes, given, value = [], {}, "x"
    for number, (op, extra) in enumerate([*before, (kind, weights)]):
        names = [f"{name}{number}" if name.strip() else "" for name in extra]
        given |= {
            f"{name}{number}": data(c, h, w) if callable(data) else data for name, data in extra.items() if name.strip()
        }
        last = number == len(before)
        outputs = ([f"part{i}" for i in range(count)] if count > 1 else ["made"]) if last else [f"step{number}"]
        nodes.append(helper.make_node(op, [value, *names], outputs, **(attributes if last else {})))
        value = outputs[0]
    if count > 1:
        nodes.append(helper.make_node("Concat", ["part1", "part0"], ["made"], axis=attributes["axis"]))
    nodes.append(helper.make_node("Cast", ["made"], ["y"], to=1))
    return model(nodes, given, shape=(batch, c, h, w), opset=opset)


def runtime(made: Any) -> Any:
    return onnxruntime.InferenceSession(made.SerializeToString()).run


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{number}-{c[0]}" for number, c in enumerate(CASES)])
def test_operator_is_the_references(number, tmp_path):
    fixed = "z" in CASES[number][1]  # sizes that are written into the file
    for seed, batch in ((number, 1 if fixed else "n"), (number + 1000, 1)):
        made = proto(CASES[number], seed, batch)
        network = build(saved(made, tmp_path))
        assert not opaque_nodes(network)
        run = runtime(made) if RUNTIME.get(CASES[number][0]) == CASES[number][3] else ReferenceEvaluator(made).run
        x = normal(seed, 3, *shape_of(seed))
        rows = x.reshape(3, 1, *x.shape[1:]) if batch == 1 else [x]
        want = np.concatenate([run(None, {"x": row})[0] for row in rows])
        with torch.no_grad():
            got = network(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_every_entry_of_the_table_is_tested():
    tested = {kind for kind, *_ in CASES} | {op for _, _, before, *_ in CASES for op, _ in before}
    assert set(OPERATORS) - tested == {"Concat", "ConstantOfShape", "GatherElements"}  # see test_network
