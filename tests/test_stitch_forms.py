"""Every form of a stitch against float64 computations, in ONNX, and the rule that decides between them."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from derc import deployed, exporting, layered, stitching
from derc.artifacts import Assembly, BlockRef, CutZoo, Joint, Partition, StitchLosses, decode, encode
from derc.assembled import live
from derc.emitted import realise
from derc.errors import UsageError
from derc.fitting import body_rows, fit
from derc.ir import Layout, TensorType
from derc.modules import Stitch
from derc.parts import check_joint
from derc.passes.cut import CutDonors
from derc.passes.lower import Lower
from derc.passes.match import Match
from derc.passes.recalibrate import Recalibrate
from derc.passes.score import Consult
from derc.passes.select import Select
from derc.passes.stitch import FitStitches
from derc.printing import print_network
from derc.recipe import read_recipe
from derc.regression import Moments
from derc.slices import Slices
from derc.stitch_forms import decided, forms, ranks
from derc.stitch_latency import stitch_shapes
from derc.stitchability import Regressor, Sample, maps, places
from derc.stitching import PLAIN, Form, cost
from derc.workload import Work, stitch_work
from tests.layers import paths, random_problem
from tests.stitches import PAIRS, build, expected, formed, random_value, with_channels
from tests.world import make_context

each_pair = pytest.mark.parametrize(
    ("before", "after"), PAIRS, ids=lambda layout: layout.replace(" of an unknown grid", "?")
)
examples = settings(deadline=None, max_examples=5, derandomize=True)
seeds = st.integers(0, 10**6)
STRIDED, AFFINE, IDENTITY = Form("strided"), Form(map="affine"), Form(map="identity")


@each_pair
@examples
@given(data=st.data(), seed=seeds)
def test_every_form_is_what_its_positions_say_at_its_cost(
    before: str, after: str, data: st.DataObject, seed: int
) -> None:
    source, target, form = data.draw(formed(before, after))
    stitch, x, price = build(source, target, seed, form), random_value(source, seed), cost(source, target, form)
    with FlopCounterMode(display=False) as counter:
        got = stitch(x)
    assert got.shape == (2, *target.shape)
    np.testing.assert_allclose(got.detach().numpy(), expected(stitch, source, target, x, form), rtol=0, atol=1e-12)
    assert price.params == sum(parameter.numel() for parameter in stitch.parameters())
    assert price.bytes == 4 * got[0].numel()
    assert form.map != "full" or 2 * price.macs == counter.get_total_flops() // 2
    key, free = stitching.key(source, target, form), form.map == "identity" and _same(source, target)
    assert stitching.parted(key) == (stitching.describe(source), stitching.describe(target), form)
    assert Form.parse(str(form)) == form
    assert (key == stitching.key(source, target)) == (form == PLAIN)
    assert stitching.costs_nothing(key) == stitching.free(source, target, form) == free
    assert (stitch_work(source, target, 2, form) == Work()) == free


def _same(source: TensorType, target: TensorType) -> bool:
    return replace(source, stride=None) == replace(target, stride=None)


def test_what_shrinks_by_a_stride_reads_a_share_of_its_source() -> None:
    source, target = TensorType((6, 8, 4), Layout.NCHW), TensorType((5, 2, 4), Layout.NCHW)
    assert stitching.moved(source, target) == 6 * 8 * 4 + 5 * 2 * 4
    assert stitching.moved(source, target, STRIDED) == 6 * 2 * 4 + 5 * 2 * 4
    assert cost(source, target, Form("strided", "full", 2)).macs == 2 * 4 * 2 * (6 + 5)
    assert cost(source, with_channels(target, 6), Form("strided", "affine")).macs == 6 * 2 * 4


@each_pair
@settings(deadline=None, max_examples=3, derandomize=True)
@given(data=st.data(), seed=seeds)
def test_what_is_fitted_is_the_least_error_of_an_affine_stitch(
    before: str, after: str, data: st.DataObject, seed: int
) -> None:
    source, target, form = data.draw(formed(before, after, ("affine",)))
    stitch, x, y = build(source, target, seed, form), random_value(source, seed, 6), random_value(target, seed + 1, 6)
    fit(stitch, x.split(1), y.split(1))
    (stitch(x) - y).square().sum().backward()
    assert all(parameter.grad.abs().max() < 1e-9 * y.square().sum() for parameter in stitch.parameters())


@pytest.mark.parametrize("form", [STRIDED, Form("bilinear"), Form("strided", "affine"), IDENTITY])
def test_fits_leave_what_numpy_leaves(form: Form) -> None:
    """On every fourth batch, of a fit to the others, in float64."""
    source, target = TensorType((4, 9, 6), Layout.NCHW), TensorType((9, 4), Layout.NLC, grid=(3, 3))
    source = source if form.map != "identity" else TensorType((4, 3, 3), Layout.NCHW)
    x = random_value(source, 1, 400)
    y = build(source, target, 3, form)(x).detach() + 0.1 * random_value(target, 2, 400)
    stitch = build(source, target, 0, form)
    error = fit(stitch, x.split(50), y.split(50))
    features, wanted = (rows.detach().numpy() for rows in body_rows(stitch, x, y))
    held = np.repeat(np.arange(400) // 50 % 4 == 3, 9)
    spread = np.square(wanted[held] - wanted[held].mean(0)).sum()
    if form.map == "full":
        design = np.concatenate([features, np.ones((len(features), 1))], 1)
        found = design[held] @ np.linalg.lstsq(design[~held], wanted[~held], rcond=None)[0]
    elif form.map == "affine":
        lines = [np.polyfit(a, b, 1) for a, b in zip(features[~held].T, wanted[~held].T, strict=True)]
        found = np.stack([np.polyval(line, a) for line, a in zip(lines, features[held].T, strict=True)], 1)
    else:
        found = features[held]
    assert error == pytest.approx(np.square(found - wanted[held]).sum() / spread, rel=1e-3)


@pytest.mark.parametrize(("channels", "width"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("count", [8, 400])
def test_a_low_rank_is_the_best_of_its_rank(channels: int, width: int, count: int) -> None:
    """By numpy: of ridge's answers, the penalty as rows of its own, only those along the first singular vectors."""
    random = np.random.default_rng(0)
    x = random.standard_normal((count, channels)) @ random.standard_normal((channels, channels)) + 3
    y = x @ random.standard_normal((channels, width)) + random.standard_normal((count, width)) - 1
    sums = Moments(channels, width)
    sums.add(torch.from_numpy(x), torch.from_numpy(y))
    centred, wanted = x - x.mean(0), y - y.mean(0)
    penalty = 0.01 * np.square(centred).sum(0).mean()
    design = np.concatenate([centred, penalty**0.5 * np.eye(channels)])
    weight = np.linalg.lstsq(design, np.concatenate([wanted, np.zeros((channels, width))]), rcond=None)[0]
    for rank in (1, 2, 5):
        down, up, intercept = (part.numpy() for part in sums.factors(0.01, rank))
        assert down.shape == (channels, rank)
        along = np.linalg.svd(design @ weight)[2][:rank]
        np.testing.assert_allclose(down @ up, weight @ along.T @ along, atol=1e-9)
        np.testing.assert_allclose(intercept, y.mean(0) - x.mean(0) @ down @ up, atol=1e-9)


@pytest.mark.parametrize("form", [Form(rank=2), Form("strided", rank=1)])
def test_a_stitch_of_low_rank_that_exists_is_found(form: Form) -> None:
    source, target = TensorType((7, 4, 6), Layout.NCHW), TensorType((13, 5), Layout.NLC, prefix=1, grid=(4, 3))
    target = target if form.regrid == "mean" else TensorType((2, 3, 5), Layout.NHWC)
    truth, x = build(source, target, 1, form), random_value(source, 1, 80)
    stitch = build(source, target, 2, form)
    assert fit(stitch, x.split(10), truth(x).detach().split(10)) < 1e-9
    torch.testing.assert_close(stitch(x), truth(x), atol=1e-4, rtol=1e-4)


def test_what_a_sample_leaves_is_what_the_fits_leave() -> None:
    """Of every form, on the same images held back, where all positions are in the sample."""
    source, target = TensorType((160, 2, 2), Layout.NCHW), TensorType((160, 2, 2), Layout.NCHW)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(256, 160, 2, 2, generator=random).double() * torch.linspace(0.1, 2, 160)[:, None, None]
    y = 0.7 * x + 0.1 * x.roll(1, 1) + 0.2 * torch.randn(256, 160, 2, 2, generator=random)
    one, other = (Sample(place, 256) for place in places(source, target))
    one.add(maps(x, source))
    other.add(maps(y, target))
    every = forms(source, target)
    assert {form.rank for form in every} == {0, 20, 40}
    found = dict(zip(every, Regressor(one).left(other, every), strict=True))
    for form, left in found.items():
        stitch = build(source, target, 0, form)
        assert left == pytest.approx(fit(stitch, x.split(1), y.split(1)), rel=0.02), form
    assert found[Form(rank=20)] > found[Form(rank=40)] > found[PLAIN]


def test_a_channel_that_says_nothing_is_a_constant() -> None:
    kind = TensorType((3, 2, 2), Layout.NCHW)
    x, y = random_value(kind, 1, 20), random_value(kind, 2, 20)
    x[:, 1] = 7.0
    stitch = build(kind, kind, 0, AFFINE)
    fit(stitch, x.split(5), y.split(5))
    assert stitch.scale[0, 1] == 0
    assert stitch.shift[0, 1].item() == pytest.approx(float(y[:, 1].mean()))


SOURCES = {
    "NCHW": TensorType((6, 8, 9), Layout.NCHW),
    "NHWC": TensorType((8, 9, 4), Layout.NHWC),
    "NLC": TensorType((73, 5), Layout.NLC, prefix=1, grid=(8, 9)),
    "NLC of an unknown grid": TensorType((38, 4), Layout.NLC, prefix=2),
    "NC": TensorType((6,), Layout.NC),
}
TARGETS = {
    "NCHW": TensorType((5, 4, 3), Layout.NCHW),
    "NHWC": TensorType((2, 3, 3), Layout.NHWC),
    "NLC": TensorType((14, 6), Layout.NLC, prefix=2, grid=(4, 3)),
    "NLC of an unknown grid": TensorType((13, 3), Layout.NLC, prefix=1),
    "NC": TensorType((7,), Layout.NC),
}


def combinations() -> list[tuple[TensorType, TensorType, Form]]:
    """For each pair of layouts a form that it may have, and affine stitches between equal types."""
    found: list[tuple[TensorType, TensorType, Form]] = []
    for place, (before, after) in enumerate(PAIRS):
        source = SOURCES[before]
        target = with_channels(TARGETS[after], source.channels)
        if source.layout is Layout.NLC is target.layout:
            target = replace(
                target, shape=(target.shape[0] - target.prefix + source.prefix, target.channels), prefix=source.prefix
            )
        some = [*forms(source, target)[1:], Form("strided", rank=2), Form("bilinear", rank=1), Form(rank=3)]
        some = [form for form in some if not stitching.obstacle(source, target, form)]
        found.append((source, target, some[place % len(some)]))
    return [*found, *((kind, kind, AFFINE) for kind in SOURCES.values())]


@pytest.fixture(scope="module")
def every() -> tuple[list[tuple[TensorType, TensorType, Form]], exporting.Parallel]:
    torch.manual_seed(0)
    found = combinations()
    assert len({form for _, _, form in found}) > 8
    return found, exporting.Parallel(stitching.build(*one) for one in found).eval()


def test_every_form_runs_the_same_in_onnx_runtime(every) -> None:
    found, parts = every
    inputs = tuple(random_value(source, seed).float() for seed, (source, _, _) in enumerate(found))
    names = [f"in{place}" for place in range(len(found))]
    model = exporting.export(parts, inputs, [f"out{place}" for place in range(len(found))], input_names=names)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    with torch.no_grad():
        want = parts(*inputs)
    for one, a, b in zip(found, got, want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=1e-5, err_msg=stitching.key(*one))


def test_the_source_of_every_form_stands_alone(every) -> None:
    scope = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(inspect.getsource(Stitch), scope)
    for one, stitch in zip(every[0], every[1].parts, strict=True):
        alone = scope["Stitch"](**stitching.arguments(*one))
        alone.load_state_dict(stitch.state_dict())
        x = random_value(one[0], 0).float()
        assert torch.equal(alone(x), stitch(x))


KIND = TensorType((8, 6, 6), Layout.NCHW)
LEVELS, STEADY = (0.1, 0.5, 1.0), (0.9, 0.5, 0.1)


@pytest.mark.parametrize(
    ("left", "wanted"),
    [
        ({PLAIN: 0.30, STRIDED: 0.32, AFFINE: 0.40, IDENTITY: 0.60}, PLAIN),
        ({PLAIN: 0.30, STRIDED: 0.26, AFFINE: 0.40, IDENTITY: 0.60}, STRIDED),
        ({PLAIN: 0.30, STRIDED: 0.28, AFFINE: 0.40, IDENTITY: 0.60}, PLAIN),
        ({PLAIN: 0.30, Form("bilinear"): 0.20, STRIDED: 0.28, AFFINE: 0.40}, Form("bilinear")),
        ({PLAIN: 0.30, Form("bilinear"): 0.245, STRIDED: 0.26, AFFINE: 0.40}, STRIDED),
        ({PLAIN: 0.30, AFFINE: 0.3, IDENTITY: 0.6}, AFFINE),
        ({PLAIN: 0.30, STRIDED: 0.2, AFFINE: 0.25, Form("strided", "affine"): 0.203}, Form("strided", "affine")),
        ({PLAIN: 0.30, AFFINE: 0.3, IDENTITY: 0.304}, IDENTITY),
        ({PLAIN: 0.30, AFFINE: 0.3, IDENTITY: 0.31}, AFFINE),
        ({PLAIN: 0.30, STRIDED: 0.30}, PLAIN),
        ({PLAIN: 0.30, Form(rank=1): 0.4, Form(rank=2): 0.304, AFFINE: 0.4}, Form(rank=2)),
    ],
)
def test_the_cheapest_form_that_does_as_well_is_taken(left: dict[Form, float], wanted: Form) -> None:
    assert decided(KIND, replace(KIND, shape=(8, 2, 2)), left, LEVELS, STEADY) == wanted


def test_a_donor_that_bears_it_takes_what_another_does_not() -> None:
    left = {PLAIN: 0.1, AFFINE: 0.3, IDENTITY: 0.6}
    assert decided(KIND, KIND, left, LEVELS, (0.99, 0.99, 0.2)) == AFFINE
    assert decided(KIND, KIND, left, LEVELS, (0.9, 0.8, 0.2)) == PLAIN
    assert decided(KIND, KIND, left, LEVELS, (0.9, 0.95, 1.0)) == IDENTITY, "what rises by chance is as it was"
    assert decided(KIND, KIND, left, LEVELS, (0.9, 0.8, 0.2), margin=0.06) == AFFINE


def test_what_does_not_keep_the_answers_is_not_taken() -> None:
    """Identity, then affine, are tried out where what they leave says that they do; a whole matrix is not."""
    left, flat = {PLAIN: 0.30, STRIDED: 0.2, AFFINE: 0.2, IDENTITY: 0.2}, (0.97, 0.97, 0.97)
    for really, wanted in (
        ({IDENTITY: 0.97}, IDENTITY),
        ({IDENTITY: 0.96, AFFINE: 0.966}, AFFINE),
        ({IDENTITY: 0.96, AFFINE: 0.96}, STRIDED),
    ):
        assert decided(KIND, KIND, left, LEVELS, flat, really.__getitem__) == wanted
    assert decided(KIND, KIND, left, LEVELS, (0.5, 0.5, 0.5), lambda _: 0.89) == STRIDED, "nearly all must stay"


def test_what_may_be_looked_at() -> None:
    halved, third = replace(KIND, shape=(8, 3, 3)), replace(KIND, shape=(5, 2, 2))
    assert forms(KIND, KIND) == (PLAIN, AFFINE, IDENTITY)
    assert ranks(128, 512) == (16, 32)
    assert ranks(127, 512) == ()
    assert {form.regrid for form in forms(KIND, halved)} == {"mean", "strided"}, "bilinear is the mean where it halves"
    assert forms(KIND, third) == (PLAIN, STRIDED, Form("bilinear"))
    assert forms(third, KIND) == (PLAIN,), "what grows is not regridded before the map"
    assert forms(KIND, replace(KIND, shape=(8, 4, 4)))[:2] == (PLAIN, Form("bilinear"))


def test_artifacts_of_earlier_versions_are_read_and_stay_as_they_were() -> None:
    blocks = BlockRef("a", 0, 2, 0), BlockRef("b", 1, 3, 1)
    old = {
        Partition: Partition({"a": blocks[:1]}, 1.0, None, {}),
        StitchLosses: StitchLosses((0.5,), {"a:2": {"b:1": 0.3}}, {"b:1": (0.9,)}),
        Assembly: Assembly(blocks, (None, Joint())),
    }
    for kind, one in old.items():
        text, arrays = encode(one)
        assert "form" not in text
        assert decode(kind, text, arrays) == one
    form = Form("strided", rank=4)
    new = [
        replace(old[Partition], forms={"a:2": {"b:1": form}}),
        replace(old[StitchLosses], forms={"a:2": {"b:1": form}}),
        Assembly(blocks, (None, Joint(form=form))),
    ]
    for one in new:
        assert decode(type(one), *encode(one)) == one
    assert json.loads(encode(new[2])[0])["joints"][1]["form"] == {"regrid": "strided", "map": "full", "rank": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An untrained residual network and a vision transformer, each with two cuts of one type."""
    return make_context(tmp_path_factory.mktemp("store"), "resnet", "vit", probe=64)


def skipping(context, name: str, form: Form) -> Assembly:
    """The donor without one block between two cuts of equal types."""
    lowered = context.lowered[name]
    kinds = [stitching.describe(cut.type) for cut in lowered.cuts]
    first = next(i for i in range(1, len(kinds) - 2) if kinds[i] == kinds[i + 1])
    blocks = BlockRef(name, 0, first, 0), BlockRef(name, first + 1, len(lowered.units), 1)
    return Assembly(blocks, (None, Joint(form=form)))


def test_an_identity_leaves_a_block_out_and_nothing_in_its_place(world) -> None:
    name = "vit"
    assembly = skipping(world, name, IDENTITY)
    stitched = FitStitches().run(world, assembly)
    assert stitched.states == ({},)
    assert not assembly.learns
    network, x = live(stitched, world.lowered), next(iter(world.data.validation.batches(4)))[0]
    bare = nn.Sequential(*(world.lowered[name].block(b.first, b.last).eval() for b in assembly.blocks))
    with torch.no_grad():
        assert torch.equal(network(x), bare(x))
    cuts = CutDonors().run(world, Lower().run(world))
    models = Slices(world, cuts, {})
    parts = [models.block(block) for block in assembly.blocks]
    assert operators(models.assembly(assembly)) == sum((operators(part) for part in parts), Counter())
    assert operators(deployed.model_of(world, stitched)) == operators(models.assembly(assembly))


def operators(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(model).graph.node)


def test_an_affine_stitch_between_equal_types_is_a_product_and_a_sum() -> None:
    kinds = KIND, TensorType((17, 8), Layout.NLC, prefix=1, grid=(4, 4)), TensorType((4, 4, 8), Layout.NHWC)
    parts = exporting.Parallel(stitching.build(kind, kind, AFFINE) for kind in kinds).eval()
    model = exporting.export(parts, tuple(random_value(kind, 0).float() for kind in kinds), ("a", "b", "c"))
    assert operators(model) == {"Mul": 3, "Add": 3}


@pytest.mark.parametrize("form", [AFFINE, IDENTITY, STRIDED])
def test_a_formed_assembly_goes_through_every_step(world, form: Form) -> None:
    """Fitted, recalibrated, printed, deployed and matched; what is printed is the assembled network."""
    assembly = skipping(world, "resnet", form) if form.regrid == "mean" else regridding(world, form)
    stitched = Recalibrate(least=1).run(world, FitStitches().run(world, assembly), Consult().run(world))
    states = [{name: torch.from_numpy(value) for name, value in state.items()} for state in stitched.states]
    donors = {one.name: one for one in world.zoo.donors}
    printed = realise(print_network(assembly, donors, world.lowered, states, None, stitched.buffers))
    x = next(iter(world.data.validation.batches(8)))[0]
    with torch.no_grad():
        assert torch.equal(printed(x), live(stitched, world.lowered)(x))
    session = onnxruntime.InferenceSession(deployed.model_of(world, stitched), providers=["CPUExecutionProvider"])
    x = next(iter(world.data.validation.batches(1)))[0]
    with torch.no_grad():
        want = live(stitched, world.lowered)(x).numpy()
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], want, atol=1e-4)
    if form == IDENTITY:
        with pytest.raises(UsageError, match="nothing to match"):
            Match(images=32).run(world, stitched)
        return
    matched = Match(images=32).run(world, stitched)
    assert matched.stitched.states[0].keys() == stitched.states[0].keys()
    assert matched.after >= matched.before


def regridding(context, form: Form) -> Assembly:
    """From one donor to the other, where a grid shrinks by a whole factor that is not two."""
    one, other = context.lowered["vit"], context.lowered["resnet"]
    last = next(i for i, cut in enumerate(one.cuts) if cut.type.spatial == (8, 8))
    first = next(i for i, cut in enumerate(other.cuts) if cut.type.spatial == (2, 2))
    return Assembly(
        (BlockRef("vit", 0, last, 0), BlockRef("resnet", first, len(other.units), 1)), (None, Joint(form=form))
    )


def test_the_graph_tells_a_network_from_one_of_other_forms(world) -> None:
    cuts = CutDonors().run(world, Lower().run(world))
    assembly = skipping(world, "resnet", IDENTITY)
    other = Assembly(assembly.blocks)
    first, second = assembly.blocks
    middle = BlockRef("resnet", first.last, second.first, 1)
    chain = first, middle, replace(second, set=2)
    forms = {f"resnet:{first.last}": {f"resnet:{second.first}": IDENTITY}}
    plain = Partition({"resnet": chain}, 0.0, None, {})
    networks = [replace(one, blocks=(first, chain[2])) for one in (assembly, other)]
    for partition, (known, unknown) in ((replace(plain, forms=forms), networks), (plain, networks[::-1])):
        graph = layered.build(cuts, partition)
        path = graph.path(known)
        assert path is not None
        assert graph.assembly(path) == known
        assert graph.path(unknown) is None
        assert len(stitch_shapes(cuts, partition)) == (partition is plain)
        stitch = 0 if known.joints else cost(KIND, KIND).params
        assert graph.costs(path)["params"] == sum(donor_params(cuts, block) for block in known.blocks) + stitch


def donor_params(cuts: CutZoo, block: BlockRef) -> int:
    return sum(unit.params for unit in cuts.donors[block.donor].units[block.first : block.last])


def test_blocks_between_any_cuts_have_forms_too() -> None:
    """Every form that the partition names is in the graph, priced, and its assemblies are paths again."""
    problem = random_problem(3, (5, 4, 4), formed=True)
    learnt = problem.learn(Select(interval=True))
    named = {form for others in problem.partition.forms.values() for form in others.values()}
    graph, found = learnt.graph, set[Form]()
    for edge in range(graph.count):
        key = graph.edges[edge].stitch
        found |= {stitching.parted(key)[2]} if key else set()
    assert named <= found <= named | {PLAIN}
    assert learnt.latency_ms is not None and np.isfinite(learnt.latency_ms).all()
    for place, assembly in zip(range(200), paths(learnt), strict=False):
        path = graph.path(assembly)
        assert path is not None, place
        assert graph.assembly(path) == assembly


@pytest.mark.parametrize(
    ("lines", "form"),
    [
        ("", PLAIN),
        ('regrid = "strided"\nrank = 4', Form("strided", rank=4)),
        ('map = "identity"', IDENTITY),
    ],
)
def test_a_recipe_names_a_form(tmp_path, lines: str, form: Form) -> None:
    block = '[[block]]\ndonor = "a"\nfirst = 0\nlast = 3\n'
    path = tmp_path / "recipe.toml"
    path.write_text(f'{block}{block}stitch = "linear"\n{lines}\n')
    assert read_recipe(path).block[1].form == form
    path.write_text(f"{block}{block}{lines}\n")
    if form != PLAIN:
        with pytest.raises(UsageError, match='block 2: regrid, map and rank are for stitch = "linear"'):
            read_recipe(path)


@pytest.mark.parametrize(
    ("form", "target", "says"),
    [
        (STRIDED, KIND, "nothing is to be strided"),
        (STRIDED, replace(KIND, shape=(8, 4, 4)), "whole factors"),
        (AFFINE, replace(KIND, shape=(9, 6, 6)), "affine is between equal widths"),
        (IDENTITY, TensorType((37, 8), Layout.NLC, prefix=1, grid=(6, 6)), "class and register tokens"),
        (Form(rank=8), KIND, "below both widths"),
        (Form(map="affine", rank=2), KIND, "a rank is of a full map"),
        (Form("largest"), KIND, "there is no form largest"),
    ],
)
def test_a_form_that_cannot_be_is_refused_with_the_reason(form: Form, target: TensorType, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_joint(Joint(form=form), KIND, target)
    check_joint(Joint(), KIND, target)
