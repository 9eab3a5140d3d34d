"""The ONNX model of an assembly as it is deployed: part by part, some blocks rewritten to a lower precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import torch

from derc import exporting
from derc.artifacts import Array, Assembly, BlockRef, Partition, StitchedAssembly, digest
from derc.assembled import Assembled, live
from derc.errors import UsageError
from derc.ir import TensorType
from derc.parts import Part, parts
from derc.pipeline import Context, code_version

CALIBRATION_IMAGES = 64
"""Probe images that show a block what flows into it."""


def differs(context: Context, assembly: Assembly) -> bool:
    """Whether the engine computes the assembly in anything else than float32 throughout."""
    return assembly.plain is not assembly or context.engine.precisions[0] != "fp32"


def engine_key(context: Context) -> str:
    """What besides assembly and donors decides how networks come out of the engine; nothing where all is float32."""
    if context.precisions == ("fp32",) and context.engine.precisions[0] == "fp32":
        return ""
    code = code_version(type(context.engine).__module__)
    return digest([context.engine.describe(), code, context.target.batch, context.data.probe.digest])


def model_of(context: Context, stitched: StitchedAssembly) -> bytes:
    """The assembly in ONNX, one input and one output; kept in the store.

    A block in a lower precision is rewritten by the engine, calibrated on what flows into it in this assembly (in
    float32) from the probe set. Raises what the engine's `rewrite` raises.
    """
    donors = [context.zoo[name].digest() for name in stitched.assembly.donors]
    key = digest(["deployed", donors, engine_key(context), code_version(__name__)], stitched, exporting.versions())
    model = context.store.get_bytes(key)
    if model is None:
        model = _joined(context, stitched)
        context.store.put_bytes(key, model, note=f"deployed {stitched.assembly}")
    return model


def _joined(context: Context, stitched: StitchedAssembly) -> bytes:
    network = live(stitched, context.lowered)
    every = parts(stitched.assembly, context.lowered)
    changed = {f"block{place}" for place, buffers in enumerate(stitched.buffers) if buffers}
    models = _exported(context, every, network, changed | ({every[-1].name} if stitched.head is not None else set()))
    for place, samples in _flows(context, every, network):
        block = every[place].spec
        if isinstance(block, BlockRef):
            models[place] = context.engine.rewrite(models[place], block.precision, samples)
    return exporting.join(same_opset(list(models.values())))


def _exported(context: Context, every: tuple[Part, ...], network: Assembled, changed: set[str]) -> dict[int, bytes]:
    """Each part in float32, by place: blocks sliced out of donors' exports, the rest, `changed` too, out of its own.

    A stitch that does nothing has none.
    """
    batch = context.target.batch
    both = zip(every, network.parts, strict=True)
    added = {part.name: module for part, module in both if _own(part, changed) and not part.free}
    slicers = {name: exporting.Slicer(donor_model(context, name)) for name in _donors(every)}
    if added:
        examples = tuple(example(part.source, batch) for part in every if part.name in added)
        names = [f"in {name}" for name in added], [f"out {name}" for name in added]
        own = exporting.export(exporting.Parallel(added.values()), examples, names[1], input_names=names[0])
        slicers[""] = exporting.Slicer(own)
    return {
        place: slicers[part.spec.donor].slice((f"cut_{part.spec.first}",), (f"cut_{part.spec.last}",))
        if isinstance(part.spec, BlockRef) and part.name not in added
        else slicers[""].slice((f"in {part.name}",), (f"out {part.name}",))
        for place, part in enumerate(every)
        if not part.free
    }


def _own(part: Part, changed: set[str]) -> bool:
    """Whether a part is in no donor as it is."""
    return part.kind != "block" or part.name in changed


def _donors(every: tuple[Part, ...]) -> list[str]:
    return list(dict.fromkeys(part.spec.donor for part in every if isinstance(part.spec, BlockRef)))


@torch.no_grad()
def _flows(context: Context, every: tuple[Part, ...], network: Assembled) -> Iterator[tuple[int, list[Array]]]:
    """What flows into each block of lower precision, in batches of the target's size, with the part's number."""
    x = next(iter(context.data.probe.batches(CALIBRATION_IMAGES)))[0]
    for place, (part, module) in enumerate(zip(every, network.parts, strict=True)):
        if isinstance(part.spec, BlockRef) and part.spec.plain is not part.spec:
            yield place, batches(x.numpy(), context.target.batch)
        x = module(x.clone())


def weight_bytes(model: bytes) -> int:
    """What the weights of an ONNX model take."""
    weights = onnx.load_from_string(model).graph.initializer
    return sum(onnx.numpy_helper.to_array(weight).nbytes for weight in weights)


def batches(images: Array, size: int) -> list[Array]:
    """`images` in arrays of `size`, the last one filled up with repeats of its last image."""
    found = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        found.append(np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)]))
    return found


def same_opset(models: list[bytes]) -> list[bytes]:
    """The models, all in the newest operator set that one of them uses; a lower precision may need a newer one."""
    protos = [onnx.load_from_string(model) for model in models]
    used = [next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")) for proto in protos]
    return [
        model if version == max(used) else _converted(proto, max(used))
        for model, proto, version in zip(models, protos, used, strict=True)
    ]


def _converted(proto: onnx.ModelProto, version: int) -> bytes:
    inlined = onnx.inliner.inline_local_functions(proto)
    return bytes(onnx.version_converter.convert_version(inlined, version).SerializeToString(deterministic=True))


def example(kind: TensorType, batch: int) -> torch.Tensor:
    """Standard normal values of type `kind`, the same each time."""
    return torch.randn(batch, *kind.shape, generator=torch.Generator().manual_seed(0))


def exportable(context: Context, partition: Partition) -> tuple[Partition, dict[str, str]]:
    """The partition without donors that cannot be exported, and why by the names of these and of their blocks.

    Raises UsageError where no donor is left.
    """
    failed: dict[str, str] = {}
    for name in context.console.track(partition.blocks, "export", len(partition.blocks)):
        try:
            donor_model(context, name)
        except UsageError as error:
            failed |= dict.fromkeys([name, *map(str, partition.blocks[name])], str(error))
    left = {name: blocks for name, blocks in partition.blocks.items() if name not in failed}
    if not left:
        raise UsageError(f"no donor can be exported to ONNX: {next(iter(failed.values()))}")
    return replace(partition, blocks=left), failed


def donor_model(context: Context, name: str) -> bytes:
    """A donor's export with each cut as the output ``cut_i``, from the store where it is there.

    Raises UsageError, which names the donor, where it cannot be exported.
    """
    lowered, batch, code = context.lowered[name], context.target.batch, code_version(exporting.__name__)
    cuts = lowered.cuts
    key = digest(["donor", context.zoo[name].digest(), batch, code], exporting.versions(), *cuts)
    model = context.store.get_bytes(key)
    if model is None:
        chain = exporting.Chain(lowered.block(i, i + 1) for i in range(len(cuts) - 1))
        outputs = [f"cut_{i}" for i in range(1, len(cuts))]
        images = example(cuts[0].type, batch)
        model = exporting.export(chain, images, outputs, input_names=["cut_0"], name=f"donor {name}")
        context.store.put_bytes(key, model, note=f"onnx {name}")
    return model
