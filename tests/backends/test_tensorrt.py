"""The TensorRT engine: refusals everywhere, and the contract where there is a GPU with TensorRT 11."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from derc import enginelock
from derc.errors import IntegrityError, MissingDependencyError, UsageError
from derc.exporting import export
from derc.registry import ENGINES, load, open_engine
from tests.networks import make

HERE = torch.cuda.is_available() and find_spec("tensorrt") is not None
gpu = pytest.mark.skipif(not HERE, reason="needs an NVIDIA GPU and TensorRT 11")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write the source of a package called tensorrt, which is found before any other."""

    def write(source):
        folder = tmp_path / "tensorrt"
        folder.mkdir()
        (folder / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    yield write
    sys.modules.pop("tensorrt", None)


def test_registered_without_loading_the_library():
    assert load(ENGINES, "tensorrt").suffix == ".plan"


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_the_package():
    with pytest.raises(MissingDependencyError, match=r"needs TensorRT 11 \(No module named 'tensorrt'\): pip install"):
        open_engine("tensorrt")


def test_bindings_without_libraries(package):
    package("raise ImportError('libnvinfer.so.11: cannot open shared object file: No such file or directory')")
    with pytest.raises(MissingDependencyError, match=r"libnvinfer\.so\.11: cannot open.*pip install \"derc\[gpu\]\"$"):
        open_engine("tensorrt")


def test_another_major_version(package):
    package("__version__ = '10.13.3'")
    with pytest.raises(MissingDependencyError, match=r"needs TensorRT 11, and this is 10\.13\.3"):
        open_engine("tensorrt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(package):
    package("__version__ = '11.4.0'")
    with pytest.raises(MissingDependencyError, match=r"needs an NVIDIA GPU that torch can use.*`derc build`"):
        open_engine("tensorrt")


def test_there_are_no_variants():
    with pytest.raises(UsageError, match="tensorrt has no variant 'fast'"):
        open_engine("tensorrt:fast")


def test_what_is_used_of_the_library_is_there():
    trt = pytest.importorskip("tensorrt", exc_type=ImportError)
    uses = {
        trt.Builder: ("create_network", "create_builder_config", "build_serialized_network"),
        trt.IBuilderConfig: (
            "builder_optimization_level",
            "clear_flag",
            "create_timing_cache",
            "get_timing_cache",
            "set_memory_pool_limit",
            "set_timing_cache",
        ),
        trt.OnnxParser: ("parse", "num_errors", "get_error"),
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: (
            "create_execution_context",
            "get_tensor_mode",
            "get_tensor_name",
            "get_tensor_shape",
            "num_io_tensors",
            "num_layers",
        ),
        trt.IExecutionContext: ("execute_async_v3", "set_tensor_address"),
        trt.BuilderFlag: ("TF32",),
        trt.MemoryPoolType: ("WORKSPACE",),
        trt.TensorIOMode: ("INPUT",),
        trt.ILogger.Severity: ("ERROR", "INTERNAL_ERROR"),
    }
    assert not [f"{kind.__name__}.{name}" for kind, names in uses.items() for name in names if not hasattr(kind, name)]


@pytest.fixture(scope="module")
def network():
    return make("resnet")


@pytest.fixture(scope="module")
def model(network):
    return export(network, torch.zeros(2, 3, 32, 32), ["output"])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)


@gpu
@pytest.mark.parametrize(("precision", "share"), [("fp32", 1e-4), ("fp16", 1e-2), ("bf16", 5e-2), ("int8", 10 / 255)])
def test_a_plan_agrees_with_torch(model, network, images, precision, share):
    engine = open_engine("tensorrt")
    if precision not in engine.precisions:
        pytest.skip(f"this GPU has no {precision}")
    session = engine.open(engine.rewrite(model, precision, [images]))
    exact = network(torch.from_numpy(images)).detach().numpy()
    assert np.abs(session.run(images) - exact).max() < share * np.abs(exact).max()
    assert 0 < session.time() < 1 and session.placement()["TensorRT"] > 0
    session.close()


@gpu
def test_a_plan_is_loaded_by_its_lock_alone(model, images, tmp_path):
    engine = open_engine("tensorrt")
    path = tmp_path / "engine.plan"
    engine.build(model, path)
    np.testing.assert_array_equal(engine.load(path).run(images), engine.load(path).run(images))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="is not what derc wrote"):
        engine.load(path)
    enginelock.place(path).unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        engine.load(path)
