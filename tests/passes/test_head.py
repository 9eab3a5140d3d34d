"""Fitted heads on real donors: what they compute, what they leave alone, and that the emitted network has them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from derc import deployed, lastlayer
from derc.artifacts import Assembly, BlockRef, decode, encode
from derc.assembled import assemble
from derc.data import Data
from derc.emitted import realise
from derc.errors import DercError, UsageError
from derc.heads import folds
from derc.judge import logits
from derc.passes.emit import Emit
from derc.passes.head import FitHeads, RefitHead
from derc.passes.score import Consult, Score
from derc.passes.stitch import FitStitches
from derc.pipeline import Timings
from derc.printing import Printed
from derc.transfer import with_heads
from tests.world import make_context

CLASSES = ("small", "middle", "large")
FAMILIES = "resnet", "vit"


def classified(data: Data) -> Data:
    """Digits by their size, three classes that no donor knows."""
    splits = [replace(s, labels=np.minimum(s.labels // 4, 2)) for s in (data.probe, data.validation, data.heldout)]
    return Data("sizes", CLASSES, *splits)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """Before and after heads were fitted; the donors are untrained, so that every layer is of use."""
    plain = make_context(tmp_path_factory.mktemp("store"), *FAMILIES, probe=128)
    plain = replace(plain, data=classified(plain.data))
    (fitted,) = with_heads([plain], "auto", Timings())
    return plain, fitted


@pytest.fixture(scope="module")
def stitched(contexts):
    _, context = contexts
    first, last = (len(context.lowered[name].units) for name in FAMILIES)
    assembly = Assembly((BlockRef("resnet", 0, first // 2, 0), BlockRef("vit", last // 2, last, 1)))
    return RefitHead().run(context, FitStitches().run(context, assembly))


def flat(context, name):
    """The donor's features on the probes by its own forward, without hooks."""
    module, path = context.lowered[name].module, lastlayer.find(context.lowered[name], torch.rand(4, 3, 32, 32))
    copied = replace_by_identity(module, path)
    images = torch.cat([images for images, _ in context.data.probe.batches(64)])
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (context.zoo[name].mean, context.zoo[name].std))
    with torch.no_grad():
        return copied((images - mean) / std).double().numpy()


def replace_by_identity(module, path):
    import copy

    copied = copy.deepcopy(module).eval()
    owner, _, name = path.rpartition(".")
    setattr(copied.get_submodule(owner), name, torch.nn.Identity())
    return copied


@pytest.mark.parametrize("name", FAMILIES)
def test_a_donors_head_is_ridge_regression_on_its_own_features(contexts, name):
    plain, context = contexts
    head = FitHeads().run(plain).heads[name]
    x, labels = flat(plain, name), plain.data.probe.labels
    if head.method == "ridge":
        unit = np.square(x - x.mean(0)).sum() / x.shape[1]
        want = Ridge(alpha=head.strength * unit, solver="svd").fit(x, np.eye(3)[labels])
        factor = np.linalg.norm(head.weight) / np.linalg.norm(want.coef_)
        np.testing.assert_allclose(head.weight, factor * want.coef_, atol=1e-3 * np.abs(head.weight).max())
    assert head.images == 128 and head.weight.shape == (3, x.shape[1])
    outputs = logits(context.lowered[name].program, plain.data.probe).numpy()
    np.testing.assert_allclose(outputs, x @ head.weight.T + head.bias, rtol=0, atol=1e-3 * np.abs(outputs).max())


def test_the_zoo_knows_the_labels_and_the_old_one_does_not_change(contexts):
    plain, context = contexts
    assert context.data.task_donors(context.zoo) == FAMILIES and not plain.data.task_donors(plain.zoo)
    for name in FAMILIES:
        assert context.zoo[name].labels == CLASSES
        assert context.zoo[name].digest() != plain.zoo[name].digest()
        assert plain.lowered[name].program(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        context.zoo[name].check()


def test_left_out_accuracy_is_the_prior_and_not_that_of_the_fit(contexts):
    from derc.passes.cut import CutDonors
    from derc.passes.embed import Embed
    from derc.passes.lower import Lower

    _, context = contexts
    embedded = Embed().run(context, CutDonors().run(context, Lower().run(context)))
    assert embedded.accuracy == {name: context.zoo[name].head.accuracy for name in FAMILIES}


def test_an_assemblys_head_is_fitted_to_its_own_features(contexts, stitched):
    _, context = contexts
    own = assemble(stitched.assembly, context.lowered, stitched.states)
    refitted = assemble(stitched.assembly, context.lowered, stitched.states, stitched.head)
    module = context.lowered["vit"].attribute(stitched.head.path)
    with lastlayer.tapped(module) as inputs:
        before = logits(own, context.data.probe, 128)
    x = inputs[0].double().numpy()
    outputs = logits(refitted, context.data.probe, 128).numpy()
    want = x @ stitched.head.weight.T + stitched.head.bias
    np.testing.assert_allclose(outputs, want, rtol=0, atol=1e-4 * np.abs(want).max())
    labels = context.data.probe.labels
    loss = torch.nn.functional.cross_entropy
    assert loss(torch.from_numpy(outputs), torch.from_numpy(labels)) < loss(before, torch.from_numpy(labels))
    assert folds(labels)  # every class is there
    with torch.no_grad():
        images = next(iter(context.data.probe.batches(16)))[0]
        torch.testing.assert_close(
            context.lowered["vit"].program(images), context.zoo["vit"].build()((images - 0.5) / 0.5), rtol=0, atol=1e-5
        )


def test_the_emitted_network_is_the_live_one(contexts, stitched):
    _, context = contexts
    emitted = Emit().run(context, stitched)
    assert emitted.parity == 0.0
    network = realise(Printed(emitted.source, {n: torch.from_numpy(w.copy()) for n, w in emitted.weights.items()}))
    images = next(iter(context.data.validation.batches(16)))[0]
    live = assemble(stitched.assembly, context.lowered, stitched.states, stitched.head)
    with torch.no_grad():
        torch.testing.assert_close(network(images), live(images), rtol=0, atol=0)
    assert "setattr(donor, 'head', nn.Linear(" in emitted.source and network(images).shape == (16, 3)


def test_the_emitted_donor_has_its_new_head(contexts):
    _, context = contexts
    intact = Assembly((BlockRef("resnet", 0, len(context.lowered["resnet"].units), 0),))
    emitted = Emit().run(context, FitStitches().run(context, intact))
    network = realise(Printed(emitted.source, {n: torch.from_numpy(w.copy()) for n, w in emitted.weights.items()}))
    images = next(iter(context.data.validation.batches(16)))[0]
    with torch.no_grad():
        torch.testing.assert_close(network(images), context.lowered["resnet"].program(images), rtol=0, atol=0)


def test_the_deployed_model_and_the_score_have_the_head(contexts, stitched, tmp_path):
    from derc.passes.package import plain_run

    _, context = contexts
    images = next(iter(context.data.validation.batches(16)))[0]
    live = assemble(stitched.assembly, context.lowered, stitched.states, stitched.head)
    with torch.no_grad():
        want = live(images).numpy()
    got = plain_run(deployed.model_of(context, stitched), 1, images.numpy())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1, np.abs(want).max()))
    scores = Score().run(context, stitched, Consult().run(context))
    right = logits(live, context.data.validation).argmax(1).numpy() == context.data.validation.labels
    np.testing.assert_array_equal(scores.correct, right)


def test_a_streamed_fit_is_one_that_leaves_out_a_batch_at_a_time(contexts, monkeypatch):
    from derc.passes import head

    plain, _ = contexts
    whole = FitHeads().run(plain).heads["resnet"]
    monkeypatch.setattr(head, "IN_MEMORY", 1)
    streamed = FitHeads(batch=16).run(plain).heads["resnet"]
    assert streamed.method == "ridge" and streamed.images == 128
    assert abs(streamed.accuracy - whole.accuracy) < 0.1


def test_heads_are_stored_and_read_back(stitched):
    text, arrays = encode(stitched)
    back = decode(type(stitched), text, arrays)
    np.testing.assert_array_equal(back.head.weight, stitched.head.weight)
    np.testing.assert_array_equal(back.head.bias, stitched.head.bias)
    assert (back.head.path, back.head.method) == (stitched.head.path, stitched.head.method)


def test_refitting_needs_a_fitted_head(contexts, stitched):
    with pytest.raises(DercError, match="vit has no fitted head"):
        RefitHead().run(contexts[0], stitched)


def test_an_assembly_with_its_own_statistics_has_its_head_fitted_to_them(contexts, stitched):
    _, context = contexts
    units = len(context.lowered["resnet"].units)
    assembly = Assembly((BlockRef("vit", 0, 1, 0), BlockRef("resnet", units // 2, units, 1)))
    plain = FitStitches().run(context, assembly)
    block = context.lowered["resnet"].block(units // 2, units)
    means = {k: v.numpy() + 1 for k, v in block.state_dict().items() if k.endswith("running_mean")}
    moved = replace(plain, buffers=({}, means))
    heads = [RefitHead().run(context, one).head for one in (plain, moved)]
    assert means and not np.allclose(heads[0].weight, heads[1].weight)
    outputs = logits(assemble(assembly, context.lowered, plain.states, heads[1], moved.buffers), context.data.probe)
    labels = torch.from_numpy(context.data.probe.labels)
    before = logits(assemble(assembly, context.lowered, plain.states, heads[0], moved.buffers), context.data.probe)
    loss = torch.nn.functional.cross_entropy
    assert loss(outputs, labels) < loss(before, labels)


def test_features_that_are_not_finite_name_the_donor(contexts):
    plain, _ = contexts
    lowered = plain.lowered["resnet"]
    norm = next(m for m in lowered.module.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.weight.detach().clone()
    try:
        with torch.no_grad():
            norm.weight.fill_(torch.inf)
        with pytest.raises(UsageError, match="donor resnet gives NaN or infinity"):
            FitHeads().run(replace(plain, zoo=replace(plain.zoo, donors=plain.zoo.donors[:1])))
    finally:
        with torch.no_grad():
            norm.weight.copy_(before)
