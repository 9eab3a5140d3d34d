"""The ONNX Runtime engine: right numbers, atomic engines, named placement, faults in one sentence."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch

from derc.backends.onnxruntime import OnnxRuntime, check_placement
from derc.errors import DercError, IntegrityError, MissingDependencyError, UsageError
from derc.exporting import export
from derc.providers import provider
from derc.registry import ENGINES, load
from tests.networks import make

BATCH = 2


@pytest.fixture(scope="module")
def network():
    return make("resnet")


@pytest.fixture(scope="module")
def model(network):
    return export(network, torch.zeros(BATCH, 3, 32, 32), ["logits"])


@pytest.fixture(scope="module")
def engine():
    return OnnxRuntime(threads=2)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((BATCH, 3, 32, 32), dtype=np.float32)


def test_registered():
    assert load(ENGINES, "onnxruntime") is OnnxRuntime


def test_open_agrees_with_torch(engine, model, network, images):
    session = engine.open(model)
    np.testing.assert_allclose(session.run(images), network(torch.from_numpy(images)).detach(), atol=1e-5)
    session.close()


def test_results_do_not_share_memory(engine, model, images):
    session = engine.open(model)
    first = session.run(images)
    kept = first.copy()
    session.run(-images)
    session.time()
    np.testing.assert_array_equal(first, kept)


def test_what_is_built_is_what_is_opened(engine, model, images, tmp_path):
    path = tmp_path / "engine.onnx"
    engine.build(model, path)
    built, opened = engine.load(path), engine.open(model)
    np.testing.assert_array_equal(built.run(images), opened.run(images))
    assert len(onnx.load(path).graph.node) < len(onnx.load_from_string(model).graph.node)
    assert [file.name for file in tmp_path.iterdir()] == ["engine.onnx"]


def test_a_failed_build_leaves_what_was_there(engine, model, tmp_path):
    path = tmp_path / "engine.onnx"
    engine.build(model, path)
    before = path.read_bytes()
    with pytest.raises(DercError, match="onnxruntime failed in loading the model") as caught:
        engine.build(b"no model", path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_load_of_a_damaged_or_missing_engine(engine, model, tmp_path):
    path = tmp_path / "engine.onnx"
    with pytest.raises(IntegrityError, match="cannot be read"):
        engine.load(path)
    engine.build(model, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="cannot be loaded"):
        engine.load(path)


def test_all_nodes_are_placed_on_the_cpu(engine, model, tmp_path):
    engine.build(model, tmp_path / "engine.onnx")
    count = len(onnx.load(tmp_path / "engine.onnx").graph.node)
    assert engine.load(tmp_path / "engine.onnx").placement() == {"CPUExecutionProvider": count}


@pytest.mark.parametrize(
    ("variant", "provider", "wheel"),
    [
        ("cuda", "CUDAExecutionProvider", "onnxruntime-gpu"),
        ("tensorrt", "TensorrtExecutionProvider", "onnxruntime-gpu"),
        ("openvino", "OpenVINOExecutionProvider", "onnxruntime-openvino"),
    ],
)
def test_an_absent_provider_is_refused_at_once(variant, provider, wheel):
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {provider}")
    with pytest.raises(MissingDependencyError, match=f"not {provider}.*pip install {wheel}$") as caught:
        OnnxRuntime(variant=variant)
    assert "pip uninstall -y onnxruntime" in str(caught.value)


def test_an_unknown_variant():
    with pytest.raises(UsageError, match=r"unknown variant onnxruntime:cudo, known: cuda.*did you mean 'cuda'"):
        OnnxRuntime(variant="cudo")


def test_two_wheels_at_once_are_refused(monkeypatch):
    versions = {"onnxruntime": "1.2", "onnxruntime-gpu": "1.3"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(MissingDependencyError, match=r"onnxruntime 1\.2, onnxruntime-gpu 1\.3 are installed at once"):
        OnnxRuntime()


def test_a_node_elsewhere_is_named():
    wanted = provider("cuda")
    check_placement(wanted, ["CUDAExecutionProvider", "CPUExecutionProvider"], {"CUDAExecutionProvider": 4})
    with pytest.raises(DercError, match="left nodes off CUDAExecutionProvider \\(2 on CPUExecutionProvider\\)"):
        check_placement(wanted, ["CUDAExecutionProvider"], {"CUDAExecutionProvider": 4, "CPUExecutionProvider": 2})
    with pytest.raises(DercError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider"):
        check_placement(wanted, ["CPUExecutionProvider"], {})


def test_options_of_the_providers():
    assert provider("").options(2) == {}
    assert provider("cuda").options(2)["enable_cuda_graph"] == "1"
    assert provider("openvino").options(3) == {"device_type": "CPU", "precision": "FP32", "num_of_threads": "3"}
    tensorrt = provider("tensorrt").options(2, Path("cache"))
    assert tensorrt["trt_timing_cache_path"] == "cache" and "trt_timing_cache_path" not in provider("tensorrt").options(
        2
    )
    assert not [name for name in tensorrt if "fp16" in name or "int8" in name or "engine_cache" in name]


def test_int8_on_the_cpu(engine, model, network, images):
    assert engine.precisions == ("fp32", "int8")
    session = engine.open(engine.rewrite(model, "int8", [images]))
    exact = network(torch.from_numpy(images)).detach().numpy()
    step = np.abs(exact).max() / 255
    assert 0 < np.abs(session.run(images) - exact).max() < 10 * step
    assert set(session.placement()) == {"CPUExecutionProvider"}
    with pytest.raises(UsageError, match="CPUExecutionProvider computes in fp32, int8, not in fp16"):
        engine.rewrite(model, "fp16", [images])


def test_an_int8_engine_is_written_and_loaded(engine, model, images, tmp_path):
    rewritten = engine.rewrite(model, "int8", [images])
    engine.build(rewritten, tmp_path / "engine.onnx")
    assert any("QLinearConv" in node.op_type for node in onnx.load(tmp_path / "engine.onnx").graph.node)
    loaded, opened = engine.load(tmp_path / "engine.onnx"), engine.open(rewritten)
    np.testing.assert_array_equal(loaded.run(images), opened.run(images))


def test_wrong_input_shape(engine, model):
    with pytest.raises(UsageError, match=r"\(2, 3, 32, 32\), not \(1, 3, 32, 32\)"):
        engine.open(model).run(np.zeros((1, 3, 32, 32), np.float32))


def test_time_and_close(engine, model):
    session = engine.open(model)
    assert 0 < session.time() < 5
    session.close()
    with pytest.raises(DercError, match="closed"):
        session.time()


def test_close_gives_the_threads_back(engine, model):
    process = psutil.Process()
    before = process.num_threads()
    sessions = [engine.open(model) for _ in range(3)]
    assert process.num_threads() >= before + 3
    for session in sessions:
        session.close()
    assert process.num_threads() == before


def test_describe_names_everything_that_changes_a_latency(engine):
    described = engine.describe()
    assert described["threads"] == "2" and described["provider"] == "CPUExecutionProvider"
    assert {"onnxruntime", "device", "os", "spinning", "machine"} <= described.keys()
    assert described == OnnxRuntime(threads=2).describe() != OnnxRuntime(threads=1).describe()


def test_threads():
    assert OnnxRuntime().threads >= 1
    with pytest.raises(UsageError, match="-1"):
        OnnxRuntime(threads=-1)


def test_without_the_runtime_the_remedy_is_named():
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from derc.registry import ENGINES, load\n"
        "load(ENGINES, 'onnxruntime')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingDependencyError: onnxruntime needs the package onnxruntime" in done.stderr
    assert 'pip install "derc[cpu]"' in done.stderr
