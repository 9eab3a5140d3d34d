"""Files that are damaged, unsafe or no network for images end in one sentence."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from derc.errors import UsageError
from derc.onnxdonor.file import fingerprint, read
from derc.onnxdonor.network import build
from tests.onnxdonor.models import integers, model, normal, saved

RELU = [helper.make_node("Relu", ["x"], ["y"])]
SCALE = [helper.make_node("Mul", ["x", "w"], ["y"])]


def outside(folder, location):
    """A model whose weight lies in the file `location`."""
    made = model(SCALE, {"w": normal(0, 4, 1, 1)})
    tensor = made.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location=location)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    path = folder / "net.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def refused(path, words):
    with pytest.raises(UsageError, match=words) as caught:
        build(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    refused(tmp_path / "no.onnx", "does not exist")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "zeros"])
def test_a_damaged_file(damage, tmp_path):
    path = saved(model(SCALE, {"w": normal(0, 4, 1, 1)}), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "text": b"hello world", "empty": b"", "zeros": bytes(99)}[damage]
    )
    refused(path, "is truncated or not an ONNX file|is not an ONNX file")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "link/weights.bin", ""])
def test_external_data_outside_the_folder_is_not_read(location, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path)
    path = outside(folder, location)
    refused(path, "outside its own folder")
    with pytest.raises(UsageError, match="outside its own folder"):
        fingerprint(path)


def test_external_data_beside_the_file_is_read_and_is_part_of_the_fingerprint(tmp_path):
    made = model(SCALE, {"w": normal(0, 4, 1, 1)})
    path = tmp_path / "net.onnx"
    onnx.save(made, str(path), save_as_external_data=True, location="net.data", size_threshold=0)
    assert np.array_equal(onnx.numpy_helper.to_array(read(path).model.graph.initializer[0]), normal(0, 4, 1, 1))
    before = fingerprint(path)
    data = (tmp_path / "net.data").read_bytes()
    (tmp_path / "net.data").write_bytes(bytes(len(data)))
    assert fingerprint(path) != before
    (tmp_path / "net.data").write_bytes(data[:3])
    refused(path, "external data of .* cannot be read")
    (tmp_path / "net.data").unlink()
    refused(path, "which does not exist")


def test_external_data_inside_a_branch_is_not_read_either(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(16))
    folder = tmp_path / "model"
    folder.mkdir()
    inner = outside(folder, "../secret")
    body = onnx.load(str(inner), load_external_data=False).graph
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    made = model([node], {"c": np.array(True)}, result=("n", 4, 6, 6))
    inner.write_bytes(made.SerializeToString())
    refused(inner, "outside its own folder")


def branches():
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "b", [], [onnx.ValueInfoProto(name="b")])
    body.output[0].CopyFrom(helper.make_tensor_value_info("b", 1, ("n", 4, 6, 6)))
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    return model([node], {"c": np.array(True)}, result=("n", 4, 6, 6))


def quantised():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    return model(nodes, {"s": np.float32(0.1)})


def sequences():
    nodes = [helper.make_node("SequenceConstruct", ["x", "x"], ["s"])]
    nodes += [helper.make_node("SequenceAt", ["s", "i"], ["y"])]
    return model(nodes, {"i": np.array(0)})


def noisy():
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])]
    return model(nodes)


REFUSED = [
    (lambda: model([helper.make_node("Add", ["x", "z"], ["y"])], inputs=("x", "z")), r"has 2 inputs \(x, z\)"),
    (lambda: model([*RELU, helper.make_node("Exp", ["x"], ["e"])], outputs=("y", "e")), r"has 2 outputs \(y, e\)"),
    (lambda: model(RELU, shape=("n", 3, "h", "w")), "images of any size: give input_size"),
    (lambda: model(RELU, shape=("n", 32, 32, 3)), "channels last"),
    (lambda: model(RELU, shape=("n", 16)), "takes 2 axes, not images"),
    (lambda: model(RELU, element=onnx.TensorProto.DOUBLE), "takes double, not float32"),
    (branches, r"control flow \(If\)"),
    (quantised, r"quantised \(QuantizeLinear\)"),
    (sequences, r"works on sequences \(SequenceConstruct\)"),
    (noisy, r"random numbers \(RandomNormalLike\)"),
    (lambda: model(RELU, opset=6), "operator set 6, supported are 7 to"),
    (lambda: model([helper.make_node("Nonsense", ["x"], ["y"])], result=("n", 4, 6, 6)), "not valid ONNX.*Nonsense"),
    (lambda: model([helper.make_node("Relu", ["gone"], ["y"])], result=("n", 4, 6, 6)), "not valid ONNX.*gone"),
    (lambda: model([helper.make_node("Identity", ["w"], ["y"])], {"w": normal(0, 1, 4)}), "gives a constant"),
    (
        lambda: model([helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)], opset=13),
        "across the images of a batch",
    ),
    (lambda: model([helper.make_node("Squeeze", ["x"], ["y"])], shape=(1, 4, 6, 6)), "across the images of a batch"),
    (
        lambda: model([helper.make_node("Reshape", ["x", "s"], ["y"])], {"s": integers(-1, 6)}, shape=("n", 4, 6, 6)),
        "one row for each image",
    ),
]


@pytest.mark.parametrize(("made", "words"), REFUSED, ids=[words[:24] for _, words in REFUSED])
def test_what_is_no_donor_is_refused(made, words, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(made().SerializeToString())
    refused(path, words)


def test_a_size_that_the_file_leaves_open_is_given_from_outside(tmp_path):
    path = saved(model(RELU, shape=("n", 3, "h", "w")), tmp_path)
    assert read(path).size((3, 8, 9)) == (3, 8, 9)
    with pytest.raises(UsageError, match=r"takes images \[3, None, None\], not \[1, 8, 9\]"):
        read(path).size((1, 8, 9))
