"""Matching on trained donors: what leaves it runs elsewhere as it does here, and nothing is made worse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import derc
from derc import bundle, deployed, stitching
from derc.amounts import Amount
from derc.artifacts import Assembly, BlockRef, Joint, Matched, StitchedAssembly
from derc.assembled import live
from derc.backends.onnxruntime import OnnxRuntime
from derc.batchnorm import reestimated
from derc.console import Console
from derc.data import Data
from derc.errors import UsageError
from derc.fronts import Step
from derc.judge import logits
from derc.matching import Learner, Lesson, agreement
from derc.matching_training import Training
from derc.milp import choose
from derc.modules import Stitch
from derc.passes.match import Match
from derc.passes.package import ALLOWED
from derc.passes.recalibrate import Recalibrate
from derc.passes.score import Consult
from derc.passes.stitch import FitStitches
from derc.pipeline import Context
from derc.precision import rewrite
from derc.recall import Recall
from derc.registry import ENGINES, load
from derc.store import Store
from derc.target import Target
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo
from tests.conftest import small_zoo
from tests.test_assembling import run as run  # a fixture
from tests.test_matching import images as random_images

FRONT, TAIL = "convnext", "effnet"
RECIPE = """
zoo = "digits"

[[block]]
donor = "convnext"
first = 0
last = 8

[[block]]
donor = "effnet"
first = 14
last = 20
"""


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    """The embedded donors, on one thread."""
    torch.set_num_threads(1)
    zoo = Zoo.load("digits", check=lambda _: None)
    data = Data.load("digits", probe=128)
    engine = load(ENGINES, "onnxruntime")(threads=1)
    store, lowered = Store(tmp_path_factory.mktemp("store")), LiveDonors(zoo, NEGLIGIBLE)
    return Context(zoo, data, Target.load("cpu"), store, engine, choose("highs"), lowered, Console(quiet=True))


@pytest.fixture(scope="module")
def stitched(context) -> StitchedAssembly:
    """Half of a donor without batch norms, then half of one with them."""
    last = len(context.lowered[TAIL].units)
    return FitStitches().run(context, Assembly((BlockRef(FRONT, 0, 9, 0), BlockRef(TAIL, 14, last, 1))))


@pytest.fixture(scope="module")
def matched(context, stitched) -> Matched:
    found = Match(images=320).run(context, stitched)
    assert found.statistics and any(found.stitched.buffers)
    assert found.after > found.before + 0.1
    return found


class AnyPrecision(OnnxRuntime):
    """ONNX Runtime on this processor, given blocks in every format, for its reference kernels take them."""

    precisions = ("fp32", "int8", "fp16")

    def rewrite(self, model: bytes, precision: str, samples) -> bytes:
        return rewrite(model, precision, samples)


def shown(context, count: int = 100) -> torch.Tensor:
    return next(iter(context.data.validation.batches(count)))[0]


def onnx_run(model: bytes, x: torch.Tensor) -> np.ndarray:
    """The answers of ONNX Runtime without any optimisation, an image at a time."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: row[None]})[0] for row in x.numpy()])


@torch.no_grad()
def torch_run(network: nn.Module, x: torch.Tensor) -> np.ndarray:
    return network(x.clone()).numpy()


def weights(one: StitchedAssembly) -> list[np.ndarray]:
    return [value for state in (*one.states, *one.buffers) for _, value in sorted(state.items())]


def test_the_engine_s_model_is_the_live_matched_network_with_its_own_statistics(context, stitched, matched):
    x = shown(context)
    want = torch_run(live(matched.stitched, context.lowered), x)
    np.testing.assert_allclose(onnx_run(deployed.model_of(context, matched.stitched), x), want, atol=1e-4)
    without = torch_run(live(replace(matched.stitched, buffers=()), context.lowered), x)
    assert np.abs(want - without).max() > 1
    assert np.abs(want - torch_run(live(stitched, context.lowered), x)).max() > 1


def test_a_bundle_on_disk_runs_as_the_live_matched_network(tmp_path, run):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    words = ["--data", "digits", "--probe", 128, "--match", 320, "--profile-s", 1, "--threads", 1]
    code, _, last = run("assemble", recipe, "-o", tmp_path / "o", *words)
    assert code == 0, last
    manifest = bundle.verify(tmp_path / "o")
    matching, (joint,) = manifest["matching"], manifest["selected"]["stitches"]
    assert matching["statistics"] and matching["kept"] and matching["teacher"] == TAIL
    assert matching["agreement"]["after"] > matching["agreement"]["before"] + 0.1
    assert matching["validation"]["after"] == manifest["accuracy"]["validation"] > matching["validation"]["before"]
    assert joint["weights"] == "matched"
    assert "// stitch1: matched" in (tmp_path / "o" / "plan.txt").read_text()
    assert "--match 320" in manifest["command"]
    data = Data.load("digits", probe=128)
    x = next(iter(data.validation.batches(300)))[0]
    given = onnx_run((tmp_path / "o" / "model.onnx").read_bytes(), x)
    loaded = torch_run(derc.load(tmp_path / "o"), x)
    np.testing.assert_allclose(given, loaded, atol=1e-4)
    assert np.mean(given.argmax(1) == data.validation.labels) == pytest.approx(matching["validation"]["after"])
    teacher = torch_run(LiveDonors(Zoo.load("digits", check=lambda _: None), NEGLIGIBLE)[TAIL].program.eval(), x)
    share = np.mean(given.argmax(1) == teacher.argmax(1))
    assert share == pytest.approx(matching["agreement"]["after"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--match", 64], "--match needs images: give --data"),
        (["--data", "digits", "--match", "64x"], "--match"),
        (["--data", "digits", "--match", 64, "--match-teacher", "best"], "--match-teacher best: no donors are judged"),
        (["--data", "digits", "--match", 64, "--match-teacher", "effnett"], "did you mean 'effnet'"),
    ],
)
def test_matching_a_recipe_that_cannot_be_matched_is_one_sentence(tmp_path, run, words, says):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    code, _, last = run("assemble", recipe, "-o", tmp_path / "o", *words)
    assert (code, says in last) == (2, True), last
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("y", "words", "says"),
    [
        (np.zeros(64, int), [], "the data have one class only, 0: add images of another"),
        (np.arange(64) % 40, [], "class 0 has 1 of the 32 images to fit a head to and needs 2"),
        (np.arange(32) % 10, [], "y must be 64 class indices from 0 as integers, it is int64 of shape (32,)"),
        (np.arange(64) % 10, ["--match-teacher", "convnextt"], "did you mean 'convnext'"),
    ],
)
def test_labels_and_teachers_that_do_not_fit_are_refused_before_any_search(tmp_path, run, y, words, says):
    grey = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", x=grey, y=y)
    zoo, data = small_zoo(tmp_path, "resnet-slim", "convnext"), f"npz:{tmp_path / 'grey.npz'}"
    words = ["--zoo", zoo, "--data", data, "--probe", 32, "--match", 64, *words, "-o", tmp_path / "o"]
    code, _, last = run("compile", *words)
    assert (code, says in last) == (2, True), last
    assert not (tmp_path / "o").exists()


def test_grey_images_match_as_the_same_in_colour(context, stitched, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (96, 32, 32, 1), dtype=np.uint8)
    found = []
    for name, images in (("grey", grey), ("colour", np.repeat(grey, 3, axis=3))):
        np.savez(tmp_path / f"{name}.npz", x=images)
        data = Data.load(f"npz:{tmp_path / name}.npz", probe=32)
        found.append(Match(images=32).run(replace(context, data=data), stitched))
    for one, other in zip(*(weights(one.stitched) for one in found), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_lower_precisions_are_of_the_network_with_its_own_statistics(context, matched, precision):
    mixed = replace(context, precisions=("fp32", precision), engine=AnyPrecision(threads=1))
    blocks = tuple(replace(block, precision=precision) for block in matched.stitched.assembly.blocks)
    lower = replace(matched.stitched, assembly=Assembly(blocks))
    x = shown(context)
    want = torch_run(live(matched.stitched, context.lowered), x)
    without = torch_run(live(replace(matched.stitched, buffers=()), context.lowered), x)
    got = onnx_run(deployed.model_of(mixed, lower), x)
    allowed = ALLOWED[precision]
    assert 0 < np.linalg.norm(got - want) < allowed.difference * np.linalg.norm(want)
    assert np.mean(got.argmax(1) == want.argmax(1)) >= allowed.agreement
    assert np.linalg.norm(got - without) > 3 * np.linalg.norm(got - want)


def test_one_thread_gives_the_same_to_the_bit_and_two_the_same_but_for_rounding(context, stitched, matched):
    again, shorter = (Match(images=count).run(context, stitched) for count in (320, 64))
    try:
        torch.set_num_threads(2)
        two, twice = (Match(images=64).run(context, stitched) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    for one, other in zip(*(weights(found.stitched) for found in (matched, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other, serial in zip(*(weights(found.stitched) for found in (two, twice, shorter)), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, serial, atol=1e-5, rtol=1e-5)
    assert (again.after, two.after, twice.after) == (matched.after, shorter.after, shorter.after)


@pytest.mark.parametrize("name", ["convnext", "effnet", "vit-patch8"])
def test_a_donor_cut_in_two_and_rejoined_stays_exactly_what_it_is(context, name):
    lowered = context.lowered[name]
    middle, end = len(lowered.units) // 2, len(lowered.units)
    blocks = BlockRef(name, 0, middle, 0), BlockRef(name, middle, end, 1)
    assembly = Assembly(blocks, joints=(None, Joint()))
    stitch = identity(lowered.cuts[middle].type)
    whole = StitchedAssembly(assembly, ({k: v.numpy() for k, v in stitch.state_dict().items()},), (0.0,))
    found = Match(images=160).run(context, whole)
    assert found.before == found.after == 1.0 and not found.statistics
    x = shown(context)
    want = torch_run(lowered.program.eval(), x)
    got = torch_run(live(found.stitched, context.lowered), x)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert (got.argmax(1) == want.argmax(1)).all()
    fitted = FitStitches().run(context, assembly)
    found = Match(images=160).run(context, fitted)
    assert found.after >= found.before > 0.97


def identity(kind) -> Stitch:
    """A stitch that changes nothing."""
    made = stitching.build(kind, kind)
    with torch.no_grad():
        made.linear.weight.copy_(torch.eye(kind.channels))
        made.linear.bias.zero_()
        if made.prefix is not None:  # mean, then the prefix tokens themselves
            made.prefix.weight.zero_()
            made.prefix.weight[:, kind.channels :].copy_(torch.eye(kind.prefix * kind.channels))
            made.prefix.bias.zero_()
    return made


class Whitened(nn.Module):
    """A block whose batch norms change nothing, as those of a network whose norms were folded into its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.norm = nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5, eps=0.0)
        with torch.no_grad():
            self.conv.weight.mul_(torch.tensor([9.0, 0.2, 3.0, 0.5, 1.0]).view(-1, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([4.0, -1.0, 0.0, 2.0, -3.0]))
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.conv(x))
        return found


class Means(nn.Module):
    """Ten answers from the mean of each map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.linear = nn.Linear(5, 10).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x.mean((2, 3)) * 10)
        return found


def test_norms_that_are_identities_stay_so_for_estimating_them_anew_would_wreck_the_network():
    torch.manual_seed(7)
    front, back, head = nn.Conv2d(3, 6, 1).requires_grad_(False), Whitened(), Means()
    stitch, truth = (Stitch(("NCHW", 6, 0, (4, 4)), ("NCHW", 5, 0, (4, 4))) for _ in range(2))
    donor = nn.Sequential(front, truth.requires_grad_(False), back)
    with torch.no_grad():
        for own, right in zip(stitch.parameters(), truth.parameters(), strict=True):
            own.copy_(right + 0.01 * torch.randn_like(right))
    lesson = Lesson(Recall(), (Step("front", front),), (Step("donor", donor),), Step("head", head))
    network, train, looked_at = Learner([(None, stitch), (1, back)], head), random_images(256), random_images(100, 1)
    before = agreement(network, lesson, looked_at)[0]
    batches = [lesson.inputs(train, torch.arange(64))]
    (_, anew) = reestimated([stitch, back], batches, [False, True])
    wrecked = agreement(network.with_statistics({1: anew}), lesson, looked_at)[0]
    assert wrecked < before - 0.3
    found = Training(network, lesson, train, looked_at, Amount(images=640)).run()
    assert found.network.buffers == {} and found.after >= before
    assert torch.equal(found.network.blocks[0].norm.running_var, torch.ones(5))
    assert torch.equal(found.network.blocks[0].norm.running_mean, torch.zeros(5))


class Broken(dict):
    """Live donors of which one gives NaN in a block."""

    def __init__(self, every, name: str) -> None:
        super().__init__(every)
        self[name] = NanBlocks(every[name])


class NanBlocks:
    """A donor whose blocks all give NaN."""

    def __init__(self, lowered) -> None:
        self.lowered = lowered

    def __getattr__(self, name: str):
        return getattr(self.lowered, name)

    def block(self, first: int, last: int) -> nn.Module:
        return nn.Sequential(self.lowered.block(first, last), nn.Threshold(float("inf"), float("nan")))


@pytest.mark.parametrize(("broken", "teacher"), [(FRONT, "tail"), (TAIL, "tail"), ("vit-patch8", "vit-patch8")])
def test_a_donor_that_gives_nan_is_named(context, stitched, broken, teacher):
    damaged = replace(context, lowered=Broken(context.lowered, broken))
    with pytest.raises(UsageError, match=f"donor {broken} gives values that are not finite, so nothing can be matched"):
        Match(images=64, teacher=teacher).run(damaged, stitched)
    if broken != teacher:
        with pytest.raises(UsageError, match=f"donor {broken} gives values that are not finite, so no stitch"):
            FitStitches().run(damaged, stitched.assembly)


def test_it_goes_on_from_recalibrated_norms_in_the_unit_of_the_head_too(context):
    slim = context.lowered["resnet-slim"]
    last = len(slim.units)
    fitted = FitStitches().run(context, Assembly((BlockRef(TAIL, 0, 5, 0), BlockRef("resnet-slim", 3, last, 1))))
    found = Recalibrate().run(context, fitted, Consult().run(context))
    assert any(name in slim.block(last - 1, last).state_dict() for name in found.buffers[1])
    split = context.data.validation
    answers = [logits(network, split).argmax(1) for network in (live(found, context.lowered), slim.program)]
    share = float((answers[0] == answers[1]).float().mean())
    assert Match(images=32).run(context, found).before == pytest.approx(share)
    anew = Match(images=32).run(context, fitted)
    assert anew.statistics and anew.after > anew.before
    assert any(name in slim.block(last - 1, last).state_dict() for name in anew.stitched.buffers[1])
