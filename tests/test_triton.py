"""Triton's model repository: its own protobuf takes every config, and the files are those that it serves."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format

from derc import bundle, triton
from derc.errors import IntegrityError, UsageError
from derc.exporting import export
from tests.networks import make


@pytest.fixture(scope="module")
def schema():
    """Triton's ModelConfig, from its client's package without the rest of it, which would want gRPC."""
    (folder,) = importlib.util.find_spec("tritonclient").submodule_search_locations
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(folder, "grpc", "model_config_pb2.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return export(make("resnet"), torch.zeros(2, 3, 32, 32), ["output"])


def described(spec):
    name, _, variant = spec.partition(":")
    return {"engine": name, "threads": "3", **({"variant": variant} if variant else {})}


def packed():
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model.xml", b"<net/>")
        archive.writestr("model.bin", b"\0\1")
    return data.getvalue()


def engine_of(spec):
    return packed() if spec == "openvino" else b"engine"


def parsed(schema, files):
    return text_format.Parse(files["derc/config.pbtxt"].decode(), schema.ModelConfig())


@pytest.mark.parametrize("spec", list(triton.KINDS))
def test_triton_takes_the_configuration(schema, model, spec):
    config = parsed(schema, triton.model_repository(model, engine_of(spec), described(spec)))
    aoti = spec.startswith("inductor")
    assert config.name == "derc" and config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    (source,), (sink,), (group,), (warmup,) = config.input, config.output, config.instance_group, config.model_warmup
    assert (source.name, list(source.dims)) == ("INPUT__0" if aoti else "input", [2, 3, 32, 32])
    assert (sink.name, list(sink.dims)) == ("OUTPUT__0" if aoti else "output", [2, 10])
    assert source.data_type == sink.data_type == schema.TYPE_FP32
    gpu = spec in ("tensorrt", "onnxruntime:cuda", "onnxruntime:tensorrt", "inductor:cuda")
    assert group.count == 1 and group.kind == (group.KIND_GPU if gpu else group.KIND_CPU)
    assert warmup.batch_size == 1 and list(warmup.inputs[source.name].dims) == [2, 3, 32, 32]
    assert warmup.inputs[source.name].zero_data
    assert (config.platform, config.backend) == (("torch_aoti", "") if aoti else ("", spec.partition(":")[0]))


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("onnxruntime", {"model.onnx"}),
        ("onnxruntime:cuda", {"model.onnx"}),
        ("openvino", {"model.xml", "model.bin"}),
        ("inductor", {"model.pt2"}),
        ("tensorrt", {"model.plan"}),
    ],
)
def test_the_one_version_holds_what_is_served(schema, model, spec, names):
    files = triton.model_repository(model, engine_of(spec), described(spec))
    assert set(files) == {"derc/config.pbtxt", *(f"derc/1/{name}" for name in names)}
    assert parsed(schema, files).default_model_filename in names
    data = {"model.onnx": model, "model.xml": b"<net/>", "model.bin": b"\0\1"}
    assert all(files[f"derc/1/{name}"] == data.get(name, b"engine") for name in names)


def test_threads_and_accelerators(schema, model):
    def config(spec):
        return parsed(schema, triton.model_repository(model, engine_of(spec), described(spec)))

    assert config("onnxruntime").parameters["intra_op_thread_count"].string_value == "3"
    assert config("openvino").parameters["INFERENCE_NUM_THREADS"].string_value == "3"
    accelerators = config("onnxruntime:tensorrt").optimization.execution_accelerators
    assert [one.name for one in accelerators.gpu_execution_accelerator] == ["tensorrt"]
    accelerators = config("onnxruntime:openvino").optimization.execution_accelerators
    assert [one.name for one in accelerators.cpu_execution_accelerator] == ["openvino"]
    assert config("tensorrt").optimization.cuda.graphs


def test_names_are_quoted(schema):
    value = 'a "b" \\ é\n'
    kind = triton.KINDS["onnxruntime"]
    text = triton.config("x", kind, triton.Tensor(value, (1,)), triton.Tensor("y", (1,)))
    found = text_format.Parse(text, schema.ModelConfig())
    assert found.input[0].name == value and list(found.model_warmup[0].inputs) == [value]


def test_a_bundle_is_written_out_and_its_model_runs(tmp_path, model):
    target = {"engine": described("onnxruntime"), "name": "cpu", "batch": 2}
    manifest = {"schema": bundle.SCHEMA, "target": target}
    bundle.write(tmp_path / "out", {"model.onnx": model, "engine.onnx": b"bound to this machine"}, manifest)
    written = triton.write(tmp_path / "out", tmp_path / "repository")
    assert sorted(written) == sorted(path for path in (tmp_path / "repository").rglob("*") if path.is_file())
    session = onnxruntime.InferenceSession(
        tmp_path / "repository/derc/1/model.onnx", providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"input": np.zeros((2, 3, 32, 32), np.float32)})[0]
    assert found.shape == (2, 10)
    with pytest.raises(UsageError, match="is not empty"):
        triton.write(tmp_path / "out", tmp_path / "repository")
    (tmp_path / "out/model.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"model\.onnx is not what derc wrote"):
        triton.write(tmp_path / "out", tmp_path / "other")


def test_what_cannot_be_served(model):
    with pytest.raises(UsageError, match="no backend for the engine openvino:bf16: choose one of onnxruntime"):
        triton.model_repository(model, b"", described("openvino:bf16"))
    with pytest.raises(UsageError, match=r"the engine tensorrt is not built yet.*derc build"):
        triton.model_repository(model, None, described("tensorrt"))
    with pytest.raises(IntegrityError, match="not what derc wrote for OpenVINO"):
        triton.model_repository(model, b"no zip", described("openvino"))
    free = onnx.load_from_string(model)
    free.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    with pytest.raises(UsageError, match="input of the model has no static shape"):
        triton.model_repository(free.SerializeToString(), b"", described("onnxruntime"))
    free.graph.output.append(free.graph.output[0])
    with pytest.raises(UsageError, match="more than one input or output"):
        triton.ends(free.SerializeToString())
