"""Latencies from before: found for the very same model only, brought to one scale, dropped on another machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from derc import deployed, reuse
from derc.artifacts import CutZoo, Latency, Partition
from derc.measure import MeasureOptions, Timing
from derc.passes.profile import Profile
from derc.reuse import LINKS, Timed, key_of, links, scaled, slowdown
from tests.passes.test_profile import thirds
from tests.world import make_context

FAMILIES = ("resnet", "vit")


@pytest.fixture
def context(tmp_path):
    return make_context(tmp_path / "store", *FAMILIES, probe=8)


def timed(ms: float) -> Timed:
    return Timed(Latency(ms, 0.99 * ms, 1.01 * ms), np.full(30, ms / 1e3))


def timing(ms: float) -> Timing:
    return Timing(ms / 1e3, ms / 1e3, ms / 1e3, True, (ms / 1e3,) * 30)


def test_other_weights_or_shapes_never_share_a_latency(context):
    options = MeasureOptions()
    model = deployed.donor_model(context, "resnet")
    key = key_of(context, model, options)
    assert key == key_of(context, model, replace(options, limit_s=1.0, seed=3))
    assert key != key_of(context, model, replace(options, precision=0.05))
    wide = replace(context, target=replace(context.target, batch=2))
    assert key != key_of(wide, deployed.donor_model(wide, "resnet"), options)
    module = context.lowered["resnet"].program
    with torch.no_grad():
        next(p for p in module.parameters() if p.dim() == 4).view(-1)[0] += 1e-3
    other = make_context(context.store.root.parent / "other", *FAMILIES, probe=8)
    changed = replace(other, lowered=context.lowered)
    assert key != key_of(context, deployed.donor_model(changed, "resnet"), options)


def test_links_span_the_latencies():
    known = {str(i): timed(float(i)) for i in range(1, 30)}
    chosen = links(known)
    assert len(chosen) == LINKS and {"1", "29"} <= set(chosen)
    assert set(links({"a": timed(1.0)})) == {"a"} and links({}) == ()


def test_the_scale_is_that_of_the_links():
    known = {"a": timed(1.0), "b": timed(2.0), "c": timed(4.0)}
    assert slowdown(known, {"a": timing(1.4), "b": timing(2.8), "new": timing(9.0)}) == pytest.approx(1.4)
    assert slowdown(known, {"a": timing(1.0), "b": timing(2.8)}) is None
    assert slowdown({}, {"a": timing(1.0)}) == 1.0
    one_off = {"a": timing(1.4), "b": timing(2.8), "c": timing(9.0)}
    assert slowdown(known, one_off) == pytest.approx(1.4)
    now = {name: timing(1.3 if name in "de" else 1.0) for name in "abcde"}
    assert slowdown({name: timed(1.0) for name in now}, now) is None
    vague = {name: Timed(Latency(1.0, 0.8, 1.5), np.ones(30)) for name in "de"}
    assert slowdown({name: timed(1.0) for name in now} | vague, now) == pytest.approx(1.0)
    assert scaled(["new"], {"new": timing(7.0)}, 1.4)["new"].latency.ms == pytest.approx(5.0)


def test_a_second_zoo_measures_only_what_is_new(context, monkeypatch):
    cuts = CutZoo({name: context.lowered[name].donor for name in FAMILIES})
    first = Partition({"resnet": thirds("resnet", len(cuts.donors["resnet"].units))}, 0.0, None, {})
    both = Partition({name: thirds(name, len(cuts.donors[name].units)) for name in FAMILIES}, 0.0, None, {})
    profile = Profile(max_stitches=4, networks=0, limit_s=8.0, precision=0.2)
    monkeypatch.setattr(reuse, "KEPT", 1.0)
    before = profile.run(context, replace(cuts, donors={"resnet": cuts.donors["resnet"]}), first)
    monkeypatch.setattr(reuse, "APART", 10.0)
    after = profile.run(context, cuts, both)
    assert after.donors["resnet"] == before.donors["resnet"] and "vit" in after.donors
    assert len(after.blocks) == 6
    for block in before.blocks:
        assert after.blocks[block] == before.blocks[block]
        np.testing.assert_array_equal(after.samples[f"block {block}"], before.samples[f"block {block}"])


def test_a_machine_that_changed_is_measured_anew(context, monkeypatch):
    cuts = CutZoo({name: context.lowered[name].donor for name in FAMILIES})
    both = Partition({name: thirds(name, len(cuts.donors[name].units)) for name in FAMILIES}, 0.0, None, {})
    profile = Profile(max_stitches=4, networks=0, limit_s=3.0, precision=0.2)
    before = profile.run(context, cuts, both)
    monkeypatch.setattr(reuse, "APART", -1.0)
    after = profile.run(context, cuts, both)
    assert all(after.blocks[block] != before.blocks[block] for block in before.blocks)
