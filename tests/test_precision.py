"""Lower precisions: float32 in and out, numbers near the exact ones, equal bytes, and overflow that is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from derc import halffloat, quantization
from derc.errors import PrecisionError, UsageError
from derc.exporting import export
from derc.precision import ranges, rewrite, used
from tests.networks import make

FAMILIES = ("resnet", "mobilenet", "convnext", "vit", "swin")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((4, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def models():
    return {family: export(make(family), torch.zeros(4, 3, 32, 32), ["output"]) for family in FAMILIES}


def run(model, x):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def model_of(nodes, weights, shape, opset=18):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return onnx.shape_inference.infer_shapes(made).SerializeToString()


def types(model):
    graph = onnx.load_from_string(model).graph
    return [info.type.tensor_type.elem_type for info in (*graph.input, *graph.output)]


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_is_near_and_has_float32_ends(models, images, family):
    made = rewrite(models[family], "fp16", [images])
    exact = run(models[family], images)
    error = np.abs(run(made, images) - exact).max() / np.abs(exact).max()
    assert 0 < error < 4 * 2.0**-10  # a few roundings to ten bits and an implied one
    assert types(made) == [TensorProto.FLOAT] * 2
    assert len(made) < 0.75 * len(models[family]) or family in ("vit", "swin", "convnext")


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_near_and_has_float32_ends(models, images, family):
    made = rewrite(models[family], "int8", [images])
    exact = run(models[family], images)
    assert 0 < np.abs(run(made, images) - exact).max() < 10 / 255 * np.abs(exact).max()
    assert types(made) == [TensorProto.FLOAT] * 2
    weights = {w.name: w.data_type for w in onnx.load_from_string(made).graph.initializer}
    assert TensorProto.INT8 in weights.values()


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_equal_arguments_give_equal_bytes(models, images, precision):
    assert rewrite(models["resnet"], precision, [images]) == rewrite(models["resnet"], precision, [images])


def test_fp32_is_the_model_itself(models):
    assert rewrite(models["resnet"], "fp32", []) is models["resnet"]


def test_bf16_agrees_with_torch(images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 5)).eval()
    made = rewrite(export(network, torch.zeros(4, 3, 32, 32), ["output"]), "bf16", [images])
    found = ReferenceEvaluator(made).run(None, {"input": images})[0]
    exact = network(torch.from_numpy(images)).detach().numpy()
    halved = network.bfloat16()(torch.from_numpy(images).bfloat16()).detach().float().numpy()
    assert found.dtype == np.float32 and np.abs(found - exact).max() > 0
    assert np.abs(found - exact).max() < 2 * max(np.abs(halved - exact).max(), 2.0**-8 * np.abs(exact).max())
    assert {w.data_type for w in onnx.load_from_string(made).graph.initializer} <= {
        TensorProto.BFLOAT16,
        TensorProto.INT64,
    }


def test_bf16_is_raised_to_an_operator_set_that_has_it(models, images):
    made = onnx.load_from_string(rewrite(models["vit"], "bf16", [images]))
    assert made.opset_import[0].version == 22
    onnx.checker.check_model(made, full_check=True)


def test_overflow_in_fp16_is_found_on_the_samples():
    nodes = [helper.make_node("Mul", ["x", "w"], ["h"]), helper.make_node("Div", ["h", "w"], ["y"])]
    model = model_of(nodes, {"w": np.array([300.0], np.float32)}, [2])
    rewrite(model, "fp16", [np.array([1, 200], np.float32)])
    with pytest.raises(PrecisionError, match=r"value h reaches 9e\+04 .*beyond the range of fp16.*use bf16"):
        rewrite(model, "fp16", [np.array([1, 2], np.float32), np.array([1, 300], np.float32)])
    rewrite(model, "bf16", [np.array([1, 300], np.float32)])


def test_a_weight_beyond_fp16_is_named():
    model = model_of([helper.make_node("Min", ["x", "cap"], ["y"])], {"cap": np.array([1e6], np.float32)}, [2])
    with pytest.raises(PrecisionError, match="the weight cap is beyond the range of fp16"):
        rewrite(model, "fp16", [np.ones(2, np.float32)])


def test_minus_infinity_of_a_mask_stays_the_lowest():
    mask = np.array([0, np.finfo(np.float32).min], np.float32)
    model = model_of(
        [helper.make_node("Add", ["x", "mask"], ["h"]), helper.make_node("Softmax", ["h"], ["y"])], {"mask": mask}, [2]
    )
    made = halffloat.rewrite(model, "fp16")
    np.testing.assert_array_equal(run(made, np.zeros(2, np.float32)), [1, 0])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_nan_in_float32_is_told_apart(precision):
    model = model_of([helper.make_node("Sqrt", ["x"], ["y"])], {}, [2])
    with pytest.raises(PrecisionError, match="value y is NaN or infinite in fp32 already"):
        rewrite(model, precision, [np.array([1, -1], np.float32)])


def test_a_divisor_that_fp16_rounds_to_zero_is_found():
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Add", ["a", "eps"], ["b"]),
        helper.make_node("Div", ["x", "b"], ["y"]),
    ]
    model = model_of(nodes, {"eps": np.array([1e-8], np.float32)}, [2])
    rewrite(model, "fp16", [np.array([1, 2], np.float32)])
    with pytest.raises(PrecisionError, match="output is NaN or infinite in fp16 and not in fp32"):
        rewrite(model, "fp16", [np.array([1, 0], np.float32)])


def test_kept_operators_stay_in_float32():
    nodes = [helper.make_node("Mul", ["x", "w"], ["h"]), helper.make_node("Pow", ["h", "two"], ["y"])]
    model = model_of(nodes, {"w": np.array([3.0], np.float32), "two": np.array([2.0], np.float32)}, [2])
    made = onnx.load_from_string(rewrite(model, "fp16", [np.ones(2, np.float32)]))
    (power,) = [node for node in made.graph.node if node.op_type == "Pow"]
    weights = {w.name: w.data_type for w in made.graph.initializer}
    assert power.output[0] == "y" and weights == {"two": TensorProto.FLOAT, "w/float16": TensorProto.FLOAT16}
    np.testing.assert_array_equal(run(made.SerializeToString(), np.array([1, 2], np.float32)), [9, 36])


def test_an_output_that_is_used_within_keeps_its_name():
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    graph = onnx.load_from_string(model_of(nodes, {}, [2]))
    graph.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2]))
    made = onnx.load_from_string(halffloat.rewrite(graph.SerializeToString(), "fp16"))
    assert [info.name for info in made.graph.output] == ["y", "z"]
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    y, z = session.run(None, {"x": np.array([-1, 2], np.float32)})
    assert y.tolist() == [0, 2] and z.tolist() == [0, -2]


def test_control_flow_is_refused():
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])], "b", [], [helper.make_empty_tensor_value_info("b")]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    model = model_of([node], {"c": np.array(True)}, [2])
    with pytest.raises(PrecisionError, match="control flow"):
        halffloat.rewrite(model, "fp16")


def test_ranges_are_those_of_the_values():
    nodes = [helper.make_node("Neg", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    (found,) = ranges(model_of(nodes, {}, [3]), [np.array([-1, 2, 5], np.float32)])
    assert found == {"h": (5.0, 8.0), "y": (1.0, 1.0)}


def test_requests_that_make_no_sense(models):
    with pytest.raises(UsageError, match="unknown precision 'fp8', known: fp32"):
        rewrite(models["resnet"], "fp8", [])
    with pytest.raises(UsageError, match="int8 needs samples"):
        rewrite(models["resnet"], "int8", [])


def test_transformers_sum_in_float32(models, images):
    def rounded(family):
        made = onnx.load_from_string(rewrite(models[family], "int8", [images]))
        source = {name: node for node in made.graph.node for name in node.output}
        adds = [node for node in made.graph.node if node.op_type == "Add"]
        return [
            all(name in source and source[name].op_type == "DequantizeLinear" for name in add.input) for add in adds
        ]

    assert all(rounded("resnet")) and rounded("resnet") and not any(rounded("vit"))


def test_tensorrt_takes_symmetric_activations_and_float_biases(models, images):
    made = onnx.load_from_string(rewrite(models["resnet"], "int8", [images], quantization.TENSORRT))
    weights = {w.name: numpy_helper.to_array(w) for w in made.graph.initializer}
    points = [
        weights[node.input[2]] for node in made.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert points and all(point.dtype == np.int8 and not point.any() for point in points)
    assert not [name for name, value in weights.items() if value.dtype == np.int32 and "bias" in name]


def test_weights_are_reduced_where_sums_would_overflow(tmp_path, models, images):
    info = tmp_path / "proc/cpuinfo"
    info.parent.mkdir()
    info.write_text("flags\t\t: fpu avx2 avx512f\n")
    reduced = quantization.for_cpu(tmp_path)
    assert reduced == replace(quantization.CPU, reduced=True)
    made = onnx.load_from_string(rewrite(models["resnet"], "int8", [images], reduced))
    weights = [numpy_helper.to_array(w) for w in made.graph.initializer if w.data_type == TensorProto.INT8]
    assert max(np.abs(w.astype(int)).max() for w in weights if w.ndim == 4) <= 64
    info.write_text("flags\t\t: fpu avx2 avx512f avx512_vnni\n")
    assert quantization.for_cpu(tmp_path) == quantization.CPU == quantization.for_cpu(tmp_path / "elsewhere")


def test_the_formats_of_a_model_are_told(models, images):
    def formats(precision, model=models["resnet"]):
        return used(onnx.load_from_string(rewrite(model, precision, [images])))

    assert formats("fp32") == ("fp32",) and formats("fp16") == ("fp16",) and formats("bf16") == ("bf16",)
    assert formats("int8") == formats("int8", models["vit"]) == ("fp32", "int8")  # means and sums stay
