"""A model repository for Triton Inference Server that serves a bundle's network.

One model, one version, static shapes with the batch inside, one instance and no batching: what was measured is what is
served. Triton's own settings are protobuf text (model_config.proto of triton-inference-server/common).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from derc import bundle
from derc.errors import IntegrityError, UsageError

NAME = "derc"


@dataclass(frozen=True)
class Tensor:
    """A float32 input or output by the name that Triton knows it by, batch axis included."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """How Triton runs one of derc's engines: its backend, the model file's name, and where instances live."""

    backend: str
    file: str
    gpu: bool = False
    platform: str = ""
    portable: bool = False
    """Whether the ONNX model is served in place of the engine's file."""
    accelerator: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    threads: str = ""
    """The backend's parameter for the number of threads."""
    names: tuple[str, str] | None = None
    """Names of input and output where the backend does not take the model's own."""


ORT = {"inter_op_thread_count": "1", "execution_mode": "0"}
ORT_THREADS = "intra_op_thread_count"
AOTI = ("INPUT__0", "OUTPUT__0")
KINDS = {
    "onnxruntime": Kind("onnxruntime", "model.onnx", portable=True, parameters=ORT, threads=ORT_THREADS),
    "onnxruntime:cuda": Kind("onnxruntime", "model.onnx", gpu=True, portable=True, accelerator="cuda", parameters=ORT),
    "onnxruntime:tensorrt": Kind(
        "onnxruntime", "model.onnx", gpu=True, portable=True, accelerator="tensorrt", parameters=ORT
    ),
    "onnxruntime:openvino": Kind(
        "onnxruntime",
        "model.onnx",
        portable=True,
        accelerator="openvino",
        parameters=ORT,
        threads=ORT_THREADS,
    ),
    "openvino": Kind(
        "openvino",
        "model.xml",
        parameters={"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"},
        threads="INFERENCE_NUM_THREADS",
    ),
    "inductor": Kind("pytorch", "model.pt2", platform="torch_aoti", names=AOTI),
    "inductor:cuda": Kind("pytorch", "model.pt2", gpu=True, platform="torch_aoti", names=AOTI),
    "tensorrt": Kind("tensorrt", "model.plan", gpu=True),
}
"""By engine and variant. ONNX Runtime's own engine file is bound to its version and processor, and Triton brings
another version: it gets the portable model, which it optimises when it loads it."""


def model_repository(
    model: bytes, engine: bytes | None, described: Mapping[str, str], name: str = NAME
) -> dict[str, bytes]:
    """The repository's files by path within it, for the ONNX `model` and the bytes of the `engine` built of it.

    `described` is what the engine says of itself, as the manifest has it under target. Raises UsageError where Triton
    has no backend for the engine, or the engine is not built yet.
    """
    kind, spec = kind_of(described), _spec(described)
    if engine is None and not kind.portable:
        raise UsageError(f"the engine {spec} is not built yet, and Triton serves nothing else: run `derc build` first")
    source, sink = ends(model)
    if kind.names:
        source, sink = Tensor(kind.names[0], source.shape), Tensor(kind.names[1], sink.shape)
    files = {f"{name}/config.pbtxt": config(name, kind, source, sink, described.get("threads", "")).encode()}
    for file, data in _artifacts(kind, model, engine or b"").items():
        files[f"{name}/1/{file}"] = data
    return files


def kind_of(described: Mapping[str, str]) -> Kind:
    """How Triton runs the engine that is `described`; raises UsageError where it has no backend for it."""
    kind = KINDS.get(_spec(described))
    if kind is None:
        raise UsageError(
            f"Triton Inference Server has no backend for the engine {_spec(described)}: choose one of "
            f"{', '.join(KINDS)}"
        )
    return kind


def _spec(described: Mapping[str, str]) -> str:
    return ":".join(filter(None, (described.get("engine", ""), described.get("variant", ""))))


def write(folder: Path, output: Path, name: str = NAME) -> list[Path]:
    """Write the repository that serves the bundle at `folder` into the new or empty directory `output`.

    Returns the paths written. Raises IntegrityError where the bundle is not whole.
    """
    manifest = bundle.verify(folder)
    bundle.check_output(output)
    engine = next((folder / file for file in manifest["files"] if Path(file).stem == "engine"), None)
    files = model_repository(
        (folder / "model.onnx").read_bytes(),
        engine.read_bytes() if engine else None,
        manifest["target"]["engine"],
        name,
    )
    for file, data in files.items():
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        (output / file).write_bytes(data)
    return [output / file for file in files]


def ends(model: bytes) -> tuple[Tensor, Tensor]:
    """Input and output of an ONNX model with one of each, of static shapes."""
    graph = onnx.load_from_string(model).graph
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise UsageError("a model with more than one input or output cannot be served: export it with one of each")
    source, sink = (
        Tensor(info.name, tuple(size.dim_value for size in info.type.tensor_type.shape.dim))
        for info in (graph.input[0], graph.output[0])
    )
    for tensor in (source, sink):
        if not tensor.shape or 0 in tensor.shape:
            raise UsageError(f"{tensor.name} of the model has no static shape: export it for one batch size")
    return source, sink


def config(name: str, kind: Kind, source: Tensor, sink: Tensor, threads: str = "") -> str:
    """The text of config.pbtxt: strict, complete, with a request of zeros that warms the model up."""
    parameters = dict(kind.parameters) | ({kind.threads: threads} if kind.threads and threads else {})
    lines = [
        f"name: {_text(name)}",
        f"platform: {_text(kind.platform)}" if kind.platform else f"backend: {_text(kind.backend)}",
        f"default_model_filename: {_text(kind.file)}",
        "max_batch_size: 0",
        f"input [ {{ {_tensor(source)} }} ]",
        f"output [ {{ {_tensor(sink)} }} ]",
        f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if kind.gpu else 'KIND_CPU'} }} ]",
        *_optimization(kind),
        *(f"parameters {{ key: {_text(k)} value {{ string_value: {_text(v)} }} }}" for k, v in parameters.items()),
        f'model_warmup [ {{ name: "zeros" batch_size: 1 inputs {{ key: {_text(source.name)} '
        f"value {{ data_type: TYPE_FP32 {_dims(source)} zero_data: true }} }} }} ]",
    ]
    return "\n".join(lines) + "\n"


def _optimization(kind: Kind) -> list[str]:
    if kind.accelerator:
        where = "gpu_execution_accelerator" if kind.gpu else "cpu_execution_accelerator"
        return [f"optimization {{ execution_accelerators {{ {where} [ {{ name: {_text(kind.accelerator)} }} ] }} }}"]
    return ["optimization { cuda { graphs: true } }"] if kind.backend == "tensorrt" else []


def _tensor(tensor: Tensor) -> str:
    return f"name: {_text(tensor.name)} data_type: TYPE_FP32 {_dims(tensor)}"


def _dims(tensor: Tensor) -> str:
    return f"dims: [ {', '.join(map(str, tensor.shape))} ]"


def _text(value: str) -> str:
    """A protobuf string: JSON's escapes of ASCII are protobuf's too."""
    return json.dumps(value)


def _artifacts(kind: Kind, model: bytes, engine: bytes) -> dict[str, bytes]:
    """The files of the one version."""
    if kind.portable:
        return {kind.file: model}
    if kind.backend != "openvino":
        return {kind.file: engine}
    try:
        with zipfile.ZipFile(io.BytesIO(engine)) as archive:
            return {name: archive.read(name) for name in ("model.xml", "model.bin")}
    except (zipfile.BadZipFile, KeyError) as error:
        raise IntegrityError(f"the engine is not what derc wrote for OpenVINO ({error}): compile again") from error
