"""OpenVINO: what it computes in, how its file is made, and that it leaves no trace; the rest is in the contract."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from derc.backends.openvino import OpenVino
from derc.engine import random_input
from derc.errors import DercError, IntegrityError, MissingDependencyError, PrecisionError, UsageError
from tests.backends.contract import IMAGES, SHAPE, exported
from tests.onnxdonor.models import model as handmade


@pytest.fixture(scope="module")
def engine():
    return OpenVino(threads=1)


@pytest.fixture(scope="module")
def model():
    return exported()


@pytest.fixture(scope="module")
def samples():
    return [random_input(SHAPE, seed) for seed in range(4)]


def kernels(session, kind: str) -> int:
    return sum(count for name, count in session.primitives().items() if name.endswith(kind))


def test_float32_is_float32_also_where_the_processor_has_bfloat16(engine, model):
    session = engine.open(model)
    assert kernels(session, "_f32") == sum(session.placement().values())


def test_bf16_really_computes_in_bf16(model):
    try:
        engine = OpenVino(threads=1, variant="bf16")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert kernels(engine.open(model), "_bf16") >= 4
    assert engine.precisions == ("bf16", "int8") and engine.describe()["precision"] == "bf16"


def test_int8_really_computes_in_int8(engine, model, samples):
    assert kernels(engine.open(engine.rewrite(model, "int8", samples)), "_I8") >= 4


def test_bf16_is_refused_where_the_processor_lacks_it(monkeypatch):
    class Core:
        def get_property(self, device, name):
            return {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"], "FULL_DEVICE_NAME": "An old CPU "}[name]

    monkeypatch.setattr("derc.backends.openvino._core", Core)
    with pytest.raises(MissingDependencyError, match="An old CPU does not compute in bfloat16: use openvino"):
        OpenVino(variant="bf16")
    assert OpenVino().precisions == ("fp32", "int8")


SIGNALLED = """
import gc, os, signal
from derc.backends.openvino import OpenVino
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first = OpenVino(threads=1).describe()
engines = [OpenVino(threads=1), OpenVino(threads=1)]
[engine.describe() for engine in engines]
while engines:
    engines.pop(0)
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_signals_are_handled_when_engines_are_gone():
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", SIGNALLED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_more_threads_than_openvino_takes_are_refused(engine):
    compiled = engine.open(exported())._compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == engine.threads == 1
    with pytest.raises(MissingDependencyError, match=r"openvino runs \d+ threads on this machine and not 9999"):
        OpenVino(threads=9999)


def test_equal_models_give_equal_files(engine, model, tmp_path):
    engine.build(model, tmp_path / "a.zip")
    engine.open(model)
    engine.build(model, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_the_file_holds_openvinos_own_model_with_float32_weights(engine, model, tmp_path):
    engine.build(model, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["model.xml", "model.bin"]
        weights = sum(4 * np.prod(w.dims) for w in onnx.load_from_string(model).graph.initializer if w.data_type == 1)
        assert archive.getinfo("model.bin").file_size >= 0.9 * weights


def test_a_zip_with_other_parts_is_refused(engine, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model.xml", "<net/>")
    with pytest.raises(IntegrityError, match=r"does not hold model\.xml and model\.bin"):
        engine.load(tmp_path / "a.zip")


def test_every_bit_of_the_parts_counts(engine, model, tmp_path):
    path = tmp_path / "a.zip"
    engine.build(model, path)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        spans = [(i.header_offset + 30 + len(i.filename), i.file_size) for i in archive.infolist()]
    for start, size in spans:
        for place in np.linspace(start, start + size - 1, 12).astype(int):
            damaged = bytearray(good)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            with pytest.raises(IntegrityError, match="damaged"):
                engine.load(path)


def test_quantising_is_the_same_in_another_process(engine, model, samples, tmp_path):
    (tmp_path / "model.onnx").write_bytes(model)
    code = (
        "import sys, pathlib\nfrom derc.backends.openvino import OpenVino\nfrom derc.engine import random_input\n"
        "folder, shape = pathlib.Path(sys.argv[1]), tuple(map(int, sys.argv[2:]))\n"
        "samples = [random_input(shape, seed) for seed in range(4)]\n"
        "made = OpenVino(threads=1).rewrite((folder / 'model.onnx').read_bytes(), 'int8', samples)\n"
        "(folder / 'int8.onnx').write_bytes(made)"
    )
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *map(str, SHAPE)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HOME": str(home), "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
    assert list(home.iterdir()) == []
    assert (tmp_path / "int8.onnx").read_bytes() == engine.rewrite(model, "int8", samples)


def test_int8_needs_samples(engine, model):
    with pytest.raises(UsageError, match="int8 needs samples"):
        engine.rewrite(model, "int8", [])


def test_int8_that_overflows_is_refused(engine):
    huge = np.full((4, 4, 1, 1), 1e38, np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Conv", ["a", "w"], ["y"])]
    proto = handmade(nodes, {"w": huge}, shape=(1, 4, 6, 6))
    with pytest.raises(PrecisionError, match="a is NaN or infinite in fp32"):
        engine.rewrite(proto.SerializeToString(), "int8", [random_input((1, 4, 6, 6))])


@pytest.mark.parametrize("package", ["nncf", "onnxruntime"])
def test_without_nncf_the_remedy_is_named(engine, model, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingDependencyError, match=rf'{package} is not installed: pip install "derc\[openvino,cpu\]"'
    ):
        engine.rewrite(model, "int8", [IMAGES])


def test_an_operator_that_openvino_lacks_is_named(engine):
    proto = handmade([helper.make_node("Nope", ["x"], ["y"], domain="odd")], shape=(1, 4, 6, 6), domains={"odd": 1})
    with pytest.raises(DercError, match=r"openvino failed in reading the model: No conversion rule.*odd\.Nope"):
        engine.open(proto.SerializeToString())


def test_sizes_that_do_not_fit_are_named(engine):
    weight = numpy_helper.from_array(np.ones((5, 6), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", 1, (2, 6))],
        [helper.make_tensor_value_info("y", 1, (2, 6))],
        [weight],
    )
    with pytest.raises(DercError, match="openvino failed in reading the model: Incompatible MatMul"):
        engine.open(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())


def test_open_sizes_are_refused(engine):
    proto = handmade([helper.make_node("Relu", ["x"], ["y"])], shape=("n", 4, 6, 6))
    with pytest.raises(DercError, match="fixed shapes"):
        engine.open(proto.SerializeToString())


def test_the_processes_own_affinity_stays(engine, model):
    before = os.sched_getaffinity(0)
    session = engine.open(model)
    session.run(IMAGES)
    assert os.sched_getaffinity(0) == before
