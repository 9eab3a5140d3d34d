"""Networks whose blocks have different precisions, from ONNX to the score, by an engine that really rounds weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from derc import deployed, stitching
from derc.artifacts import Assembly, BlockRef, Emitted, StitchedAssembly
from derc.assembled import assemble
from derc.emitted import realise
from derc.errors import ParityError, PrecisionError
from derc.judge import answers
from derc.passes.emit import Emit
from derc.passes.package import Package, check, compare
from derc.passes.profile import intact_model
from derc.passes.score import Consult, Score
from derc.passes.stitch import FitStitches
from derc.printing import Printed
from tests.engines import Rounding, Wrong
from tests.world import make_context


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    made = make_context(tmp_path_factory.mktemp("store"), "resnet", "vit", probe=96)
    return replace(made, engine=Rounding(threads=1), precisions=("fp32", "int8", "bf16"))


@pytest.fixture(scope="module")
def plain(context) -> StitchedAssembly:
    """Two blocks of one donor, a stitch, and the last block of another."""
    first, second = context.lowered["resnet"], context.lowered["vit"]
    middle, end = len(first.units) // 2, len(second.units)
    assembly = Assembly(
        (BlockRef("resnet", 0, 1, 0), BlockRef("resnet", 1, middle, 1), BlockRef("vit", end // 2, end, 2))
    )
    assert stitching.keeps_places(first.cuts[middle].type, second.cuts[end // 2].type)
    return FitStitches().run(context, assembly)


def in_precisions(stitched: StitchedAssembly, *precisions: str) -> StitchedAssembly:
    blocks = (replace(b, precision=p) for b, p in zip(stitched.assembly.blocks, precisions, strict=True))
    return replace(stitched, assembly=Assembly(tuple(blocks)))


@pytest.fixture
def mixed(plain) -> StitchedAssembly:
    return in_precisions(plain, "fp32", "int8", "fp32")


def images(context, count: int) -> torch.Tensor:
    return next(iter(context.data.validation.batches(count)))[0]


def run(model: bytes, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": row[None]})[0] for row in x])


@torch.no_grad()
def computed(network, x: torch.Tensor) -> np.ndarray:
    return network(x.clone()).numpy()


def rounded(context, stitched: StitchedAssembly) -> torch.nn.Module:
    """The network with the weights of its int8 blocks rounded in torch."""
    network = assemble(stitched.assembly, context.lowered, stitched.states)
    blocks = [part for part in network.parts if not isinstance(part, type(network.stitches[0]))]
    for block, ref in zip(blocks, stitched.assembly.blocks, strict=True):
        if ref.precision == "int8":
            for weight in [*block.parameters(), *block.buffers()]:
                if weight.is_floating_point():
                    step = weight.abs().max().clamp_min(1e-9) / 127
                    weight.data = (weight / step).round() * step
    return network


def test_float32_parts_join_to_the_network(context, plain):
    x = images(context, 4)
    want = computed(assemble(plain.assembly, context.lowered, plain.states), x)
    np.testing.assert_allclose(run(deployed.model_of(context, plain), x.numpy()), want, atol=1e-5)


def test_the_block_of_lower_precision_is_rewritten_and_no_other(context, plain, mixed):
    """The rounded block is one without batch-norms: the exporter would fold them into what is rounded."""
    stitched = in_precisions(plain, "fp32", "fp32", "int8")
    x = images(context, 4)
    float32 = computed(assemble(plain.assembly, context.lowered, plain.states), x)
    want = computed(rounded(replace(context, lowered=fresh(context)), stitched), x)
    got = run(deployed.model_of(context, stitched), x.numpy())
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.abs(got - float32).max() > 10 * np.abs(got - want).max()


def fresh(context):
    """The donors once more, to be changed."""
    return type(context.lowered)(context.zoo, context.lowered.negligible)


def test_a_block_is_calibrated_on_what_flows_into_it_in_this_assembly(context, plain):
    stitched = in_precisions(plain, "int8", "fp32", "int8")
    context.engine.seen.clear()
    deployed.model_of(context, stitched)
    assert [precision for precision, _ in context.engine.seen] == ["int8", "int8"]
    x = next(iter(context.data.probe.batches(64)))[0]
    network = assemble(plain.assembly, context.lowered, plain.states)
    np.testing.assert_array_equal(np.concatenate(context.engine.seen[0][1]), x.numpy())
    flow = computed(torch.nn.Sequential(*list(network.parts)[:3]), x)
    np.testing.assert_allclose(np.concatenate(context.engine.seen[1][1]), flow, atol=1e-5)
    deployed.model_of(context, stitched)
    assert len(context.engine.seen) == 2, "the store had the answer"


def test_parts_of_different_operator_sets_become_one_network(context, plain):
    x = images(context, 4)
    model = deployed.model_of(context, in_precisions(plain, "fp32", "bf16", "int8"))
    want = computed(assemble(plain.assembly, context.lowered, plain.states), x)
    assert [entry.version for entry in onnx.load_from_string(model).opset_import if not entry.domain] == [22]
    got = run(model, x.numpy())
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.1


def test_weights_are_counted_as_they_are_stored():
    weights = [np.zeros((3, 4), np.float32), np.zeros(5, np.int8), np.zeros((), np.float16)]
    made = [onnx.numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
    graph = onnx.helper.make_graph([], "g", [], [], made)
    assert deployed.weight_bytes(onnx.helper.make_model(graph).SerializeToString()) == 48 + 5 + 2


def test_batches_are_filled_up():
    x = np.arange(5.0)[:, None]
    assert [part[:, 0].tolist() for part in deployed.batches(x, 2)] == [[0, 1], [2, 3], [4, 4]]


def test_a_mixed_network_is_scored_as_the_engine_computes_it(context, mixed):
    found = Score().run(context, mixed, Consult().run(context))
    x, labels = next(iter(context.data.validation.batches(10_000)))
    outputs = torch.from_numpy(run(deployed.model_of(context, mixed), x.numpy()))
    np.testing.assert_array_equal(found.correct, answers(outputs, None) == labels.numpy())


def test_what_gives_nan_is_no_network(context, mixed, tmp_path):
    broken = Rounding(threads=1)
    broken.broken = True
    with pytest.raises(PrecisionError, match="gives NaN or infinity on validation images"):
        Score().run(replace(context, engine=broken, store=type(context.store)(tmp_path)), mixed, Consult().run(context))


def test_keys_tell_engines_apart_only_where_they_matter(context):
    float32 = replace(context, precisions=("fp32",))
    assert deployed.engine_key(float32) == ""
    other = replace(context, engine=Rounding(threads=2))
    assert len({deployed.engine_key(context), deployed.engine_key(other), ""}) == 3


@pytest.fixture(scope="module")
def emitted(context, plain) -> Emitted:
    return Emit().run(context, in_precisions(plain, "fp32", "int8", "fp32"))


def test_the_module_stays_float32_and_says_so(context, plain, emitted):
    float32 = Emit().run(context, plain)
    printed = (
        Printed(e.source, {n: torch.from_numpy(w.copy()) for n, w in e.weights.items()}) for e in (float32, emitted)
    )
    x = images(context, 3)
    one, other = (computed(realise(each), x) for each in printed)
    np.testing.assert_array_equal(one, other)
    block = plain.assembly.blocks[1]
    assert f"In model.onnx and in the engine int8 computes {block}.\nHere everything is float32.\n" in emitted.source
    assert f"{block}@int8" in emitted.source and "int8" not in float32.source
    assert (emitted.precisions, float32.precisions) == (("fp32", "int8"), ("fp32",))


def test_a_mixed_network_is_packaged_by_relative_difference(context, emitted):
    shipped = Package(limit_s=1).run(context, emitted, intact_model(context, "resnet"))
    parity = shipped.parity
    assert parity.relative and 0 < parity.module_onnx < parity.tolerance == 0.3
    assert parity.onnx_engine < 1e-4 and parity.agreement >= parity.least_agreement == 0.85


OUTPUTS = np.random.default_rng(0).standard_normal((40, 10)).astype(np.float32)


def test_parity_in_float32_is_the_largest_difference():
    off = OUTPUTS.copy()
    off[3, 4] += 1e-3
    parity = compare(OUTPUTS, OUTPUTS, off, "fp32")
    assert not parity.relative and parity.module_onnx == 0
    assert parity.module_engine == parity.onnx_engine == pytest.approx(1e-3, rel=1e-3)
    assert parity.tolerance == pytest.approx(1e-4 * np.abs(OUTPUTS).max())


def test_parity_in_a_lower_precision_is_relative_and_counts_answers():
    off = OUTPUTS + 0.1 * np.random.default_rng(1).standard_normal(OUTPUTS.shape).astype(np.float32)
    parity = compare(OUTPUTS, OUTPUTS, off, "int8")
    assert parity.module_engine == pytest.approx(np.linalg.norm(off - OUTPUTS) / np.linalg.norm(OUTPUTS), rel=1e-5)
    assert parity.agreement == (off.argmax(1) == OUTPUTS.argmax(1)).mean()
    assert compare(OUTPUTS, None, off, "bf16").module_onnx is None


@pytest.mark.parametrize("place", ["plain", "built"])
def test_nan_in_a_lower_precision_is_an_error_of_its_own(place):
    bad = OUTPUTS.copy()
    bad[0, 0] = np.nan
    forms = {"plain": OUTPUTS, "built": OUTPUTS} | {place: bad}
    with pytest.raises(PrecisionError, match="NaN or infinity in fp16"):
        compare(OUTPUTS, **forms, precision="fp16")


def test_an_engine_that_computes_something_else_is_refused(context, emitted):
    with pytest.raises(ParityError, match=r"differ by .* on probe images, over 0\.[13]"):
        Package(limit_s=1).run(replace(context, engine=Wrong(threads=1)), emitted, intact_model(context, "resnet"))


def test_an_engine_that_computes_otherwise_than_onnx_is_refused_within_the_format_s_own_tolerance():
    """Rounding moves module and ONNX apart by 20%, which int8 may; ONNX and engine round alike and may not."""
    rng = np.random.default_rng(0)
    coarse = OUTPUTS + 0.2 * np.linalg.norm(OUTPUTS) / np.sqrt(OUTPUTS.size) * rng.standard_normal(OUTPUTS.shape)
    check(replace(compare(OUTPUTS, coarse, coarse, "int8"), agreement=1.0))
    with pytest.raises(ParityError, match=r"onnx and engine differ by 0\.\d+ on probe images, over 0\.1:"):
        check(replace(compare(OUTPUTS, OUTPUTS, coarse, "int8"), agreement=1.0))
