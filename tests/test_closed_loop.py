"""What is shipped is measured, and a busy machine is not mistaken for a slow network."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from derc import shipping
from derc.artifacts import Assembly, BlockRef, Latency, LatencyTable, StitchedAssembly
from derc.console import Console
from derc.errors import UnstableError
from derc.passes.emit import Emit
from derc.passes.select import Select
from derc.pipeline import Timings
from tests.world import make_context


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A context of one donor, and that donor emitted."""
    context = replace(make_context(tmp_path_factory.mktemp("intact"), "resnet"), console=Console())
    units = len(context.lowered["resnet"].units)
    return context, Emit().run(context, StitchedAssembly(Assembly((BlockRef("resnet", 0, units, 0),)), (), ()))


@pytest.fixture
def shipped(intact, monkeypatch, capsys):
    """A function from (known ms of the anchor, budget) to what was measured and said."""
    monkeypatch.setattr(shipping, "PAUSES_S", (0.0, 0.0))
    context, emitted = intact

    def run(known, budget):
        table = LatencyTable("cpu", {}, {"resnet": Latency(known, known, known)}, {}, {}, 0.0)
        search = SimpleNamespace(context=context, table=table, select=Select(latency_ms=budget))
        found = shipping._measured(search, emitted, 1.0, Timings())
        return found, capsys.readouterr().err.count("measuring again")

    return run


def test_over_budget_with_a_slow_anchor_is_measured_again_and_then_refused(shipped, capsys):
    with pytest.raises(UnstableError, match=r"resnet takes .* times its known latency"):
        shipped(1e-6, 1e-6)
    assert capsys.readouterr().err.count("measuring again") == 2


def test_an_interval_around_the_budget_is_measured_again_after_a_pause(shipped, monkeypatch, capsys):
    """The budget is what was last measured, and the interval is too wide to tell."""
    pauses, budget = [], shipped(1e6, 1e6)[0].latency.ms
    monkeypatch.setattr(shipping, "PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(shipping.time, "sleep", pauses.append)
    run = shipping.Package.run

    def vague(self, *given):
        found = run(self, *given)
        return replace(found, latency=replace(found.latency, low_ms=0.5 * budget, high_ms=2 * budget, stable=False))

    monkeypatch.setattr(shipping.Package, "run", vague)
    with pytest.raises(UnstableError, match="the latency did not settle"):
        shipped(1e6, budget)
    assert pauses == [0.01, 0.02] and capsys.readouterr().err.count("do not tell whether") == 2


def test_over_budget_with_the_anchor_as_known_is_believed(shipped):
    assert shipped(1e6, 1e-6)[1] == 0


def test_within_budget_is_believed_whatever_the_anchor_says(shipped):
    found, times = shipped(1e-6, 1e6)
    assert times == 0
    assert found.latency.high_ms < 1e6
    assert found.anchor.ms == pytest.approx(found.latency.ms, rel=0.5)
