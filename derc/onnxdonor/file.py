"""Reading an ONNX file that others wrote: checked, nothing read outside its folder, images in and one tensor out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import external_data_helper, inliner

from derc.errors import UsageError

OLDEST_OPSET = 7
CONTROL = ("If", "Loop", "Scan")
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
MOST_CHANNELS = 4
"""Images that have more channels than this, and no more columns, are taken to have their channels last."""
TENSOR_FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class OnnxFile:
    """A checked model; `shape` is its input's (N, C, H, W), None where the file leaves an axis open."""

    path: Path
    model: onnx.ModelProto
    input: str
    output: str
    shape: tuple[int | None, ...]

    @property
    def opsets(self) -> dict[str, int]:
        """Version of each operator domain, the default one under the empty name."""
        return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in self.model.opset_import}

    def size(self, wanted: tuple[int, ...] | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the images: the file's, with `wanted` where it leaves an axis open.

        Raises UsageError where an axis stays open, is fixed to another size than `wanted`, or the channels are last.
        """
        if wanted is None:
            if None in self.shape[1:]:
                raise UsageError(f"{self.path} takes images of any size: give input_size")
            found = tuple(int(side or 0) for side in self.shape[1:])
        else:
            fixed = [side is None or side == want for side, want in zip(self.shape[1:], wanted, strict=False)]
            if len(wanted) != 3 or not all(fixed):
                raise UsageError(f"{self.path} takes images {list(self.shape[1:])}, not {list(wanted)} (input_size)")
            found = tuple(wanted)
        if found[0] > MOST_CHANNELS >= found[2]:
            raise UsageError(
                f"{self.path} takes images {list(found)} with their channels last: convert it with channels first "
                "(tf2onnx --inputs-as-nchw)"
            )
        return found[0], found[1], found[2]


def fingerprint(path: Path) -> str:
    """SHA-256 of the file's bytes and of those of its external data; raises UsageError as `read` does."""
    files = [path, *sorted(_external_files(_parse(path), path))]
    state = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            state.update(hashlib.file_digest(stream, "sha256").digest())
    return state.hexdigest()


def read(path: Path) -> OnnxFile:
    """The model in `path`, its own functions inlined.

    Raises UsageError for a file that is missing, damaged, no valid ONNX, reaches out of its folder, or is no network
    from one batch of float32 images to one tensor.
    """
    model = _parse(path)
    _external_files(model, path)
    try:
        external_data_helper.load_external_data_for_model(model, str(path.resolve().parent))
    except Exception as error:  # onnx raises errors of many kinds on damaged files
        raise UsageError(f"the external data of {path} cannot be read ({_line(error)}): copy it again") from error
    _check(model, path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    for node in model.graph.node:
        _check_operator(node, path)
    return _with_ends(model, path)


def _parse(path: Path) -> onnx.ModelProto:
    """The model without its external data."""
    if not path.is_file():
        raise UsageError(f"ONNX file {path} does not exist or is not a file: check the path")
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's errors differ between its implementations
        raise UsageError(f"{path} is truncated or not an ONNX file: download or copy it again") from error
    if not model.graph.node or not model.ir_version:
        raise UsageError(f"{path} is not an ONNX file, or holds no network: check the path")
    return model


def _check(model: onnx.ModelProto, path: Path) -> None:
    """Raise UsageError for a version that is not supported, or what the ONNX standard does not allow."""
    version = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise UsageError(
            f"{path} has operator set {version}, supported are {OLDEST_OPSET} to {newest}: "
            "convert it with onnx.version_converter, or update the package onnx"
        )
    try:
        onnx.checker.check_model(model, full_check=model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF)
    except Exception as error:  # the checker and shape inference raise different ones
        raise UsageError(f"{path} is not valid ONNX: {_line(error)}; export it again") from error


def _check_operator(node: onnx.NodeProto, path: Path) -> None:
    """Raise UsageError for what no donor may have."""
    kind = node.op_type
    if kind in CONTROL:
        raise UsageError(f"{path} has control flow ({kind}): export the network without branches and loops")
    if kind in QUANTISED or kind.startswith("QLinear") or node.op_type.startswith("QGemm"):
        raise UsageError(f"{path} is quantised ({kind}): give the float32 model that it was made from")
    if "Sequence" in kind or kind.startswith("Optional"):
        raise UsageError(f"{path} works on sequences ({kind}): export a network of tensors only")
    if kind in RANDOM:
        raise UsageError(f"{path} draws random numbers ({kind}): export it in eval mode")


def _with_ends(model: onnx.ModelProto, path: Path) -> OnnxFile:
    """The model with its one input and output; raises UsageError where it has others."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    outputs = [value.name for value in model.graph.output]
    for what, names in (("inputs", [value.name for value in inputs]), ("outputs", outputs)):
        if len(names) != 1:
            raise UsageError(
                f"{path} has {len(names)} {what} ({', '.join(names[:4])}), a donor has one: "
                "cut the model with onnx.utils.extract_model"
            )
    kind = inputs[0].type
    if not kind.HasField("tensor_type") or kind.tensor_type.elem_type != TENSOR_FLOAT:
        raise UsageError(f"{path} takes {_type_name(kind)}, not float32 images: export it in float32")
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim)
    if len(dims) != 4:
        raise UsageError(f"{path} takes {len(dims)} axes, not images (N, C, H, W)")
    return OnnxFile(path, model, inputs[0].name, outputs[0], tuple(side or None for side in dims))


def _type_name(kind: onnx.TypeProto) -> str:
    if not kind.HasField("tensor_type"):
        return str(kind.WhichOneof("value")).removesuffix("_type")
    return str(onnx.TensorProto.DataType.Name(kind.tensor_type.elem_type)).lower()


def _external_files(model: onnx.ModelProto, path: Path) -> set[Path]:
    """Files that hold tensors of the model; raises UsageError unless all lie in its own folder."""
    folder = path.resolve().parent
    found = set()
    for tensor in _tensors(model):
        if not external_data_helper.uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        file = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
            raise UsageError(
                f"{path} keeps {tensor.name!r} in {location!r}, outside its own folder: derc does not read it; "
                "save the model again with its data beside it"
            )
        if not file.is_file():
            raise UsageError(f"{path} keeps its weights in {file}, which does not exist: copy both files")
        found.add(file)
    return found


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, those in its functions and inner graphs included."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(graph)


def _line(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
