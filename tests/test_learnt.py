"""What is learnt from evaluated assemblies."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from derc.artifacts import Assembly, Evaluated, Knowledge
from derc.errors import DercError
from derc.learnt import margin_from, prior_loss
from derc.passes.select import Select
from tests.layers import paths, random_knowledge, random_problem, without_accuracy
from tests.zoos import latency, table_of


def test_an_intact_donor_costs_its_own_error_and_its_own_time() -> None:
    problem = random_problem(0, (6, 5, 4))
    learnt = problem.learn(Select())
    for name, accuracy in problem.embedded.accuracy.items():
        intact = problem.intact(name)
        assert learnt.expected_loss(intact) == pytest.approx(1 - accuracy)
        assert learnt.predict(intact)["latency_ms"] == problem.table.donors[name].ms
        path = list(learnt.graph.path(intact) or ())
        assert learnt.latency_ms is not None
        assert learnt.latency_ms[path].sum() == pytest.approx(problem.table.donors[name].ms, rel=0.3)


def test_a_donor_of_unknown_accuracy_counts_as_the_mean() -> None:
    problem = random_problem(0, (4, 4, 4))
    known = {"d0": 0.9, "d1": 0.7}
    learnt = replace(problem, embedded=replace(problem.embedded, accuracy=known)).learn(Select())
    assert learnt.expected_loss(problem.intact("d2")) == pytest.approx(0.2)


def test_without_accuracies_the_larger_donor_is_preferred() -> None:
    problem = without_accuracy(random_problem(2, (4, 6, 5)))
    learnt = problem.learn(Select())
    macs = {name: sum(unit.macs for unit in donor.units) for name, donor in problem.cuts.donors.items()}
    by_size = sorted(macs, key=lambda name: -macs[name])
    assert by_size == sorted(macs, key=lambda name: learnt.expected_loss(problem.intact(name)))


def test_leaving_out_sets_is_no_bargain() -> None:
    problem = random_problem(3, (6, 6), blocks=4)
    graph = problem.learn(Select()).graph
    loss = prior_loss(graph, problem.cuts, problem.embedded)
    for place, edge in enumerate(graph.edges):
        assert loss[place] >= edge.skipped / 4


def test_a_measured_assembly_predicts_itself_and_moves_its_neighbours() -> None:
    problem = random_problem(4, (5, 5, 5))
    before = problem.learn(Select())
    stitched = [assembly for assembly in paths(before) if not assembly.intact]
    slow, other = stitched[0], next(a for a in stitched[1:] if set(a.blocks) & set(stitched[0].blocks))
    expected = before.predict(slow)["latency_ms"] or 0.0
    knowledge = Knowledge((Evaluated(slow, 0.3, latency(2 * expected)),))
    after = problem.learn(Select(), knowledge)
    assert after.predict(slow)["latency_ms"] == 2 * expected
    assert after.latency_ms is not None
    assert expected * 1.1 < after.latency_ms[list(after.graph.path(slow) or ())].sum() <= 2 * expected
    assert (after.predict(other)["latency_ms"] or 0) > (before.predict(other)["latency_ms"] or 0)
    assert after.expected_loss(slow) == pytest.approx(0.7)


def test_later_measurements_replace_earlier_ones() -> None:
    problem = random_problem(4, (5, 5))
    intact = problem.intact("d0")
    knowledge = Knowledge((Evaluated(intact, None, latency(7.0)), Evaluated(intact, None, latency(8.0))))
    assert problem.learn(Select(), knowledge).predict(intact)["latency_ms"] == 8.0


def test_additive_truth_is_learnt_from_samples() -> None:
    problem = random_problem(5, (5, 5, 5, 5))
    before = problem.learn(Select())
    random = np.random.default_rng(0)
    truth = before.loss + random.normal(0, 0.1, len(before.loss))
    every = [a for a in paths(before) if not a.intact]
    order = random.permutation(len(every))
    seen, unseen = [every[i] for i in order[:40]], [every[i] for i in order[40:]]
    value = {a: float(truth[list(before.graph.path(a) or ())].sum()) for a in every}
    after = problem.learn(Select(), Knowledge(tuple(Evaluated(a, 1 - value[a]) for a in seen)))
    errors = [[abs(m.expected_loss(a) - value[a]) for a in unseen] for m in (before, after)]
    assert np.mean(errors[1]) < 0.5 * np.mean(errors[0])


@pytest.mark.parametrize("lower", [(), ("fp16", "int8")])
def test_features_are_those_of_the_edges(lower: tuple[str, ...]) -> None:
    problem = random_problem(6, (4, 4, 4), lower=lower)
    learnt = problem.learn(Select())
    assert learnt.surrogate is not None
    edges, groups = learnt.graph.edges, {group.name: group for group in learnt.surrogate.groups}

    def shared(name: str, one: int, other: int) -> bool:
        keys = groups[name].keys
        assert keys is not None
        return bool(keys[one] == keys[other] >= 0)

    for one, other in combinations(range(0, len(edges), 7), 2):
        a, b = edges[one], edges[other]
        blocks = a.target is not None and b.target is not None and a.target.plain == b.target.plain
        sources = [edge.source and edge.source.plain for edge in (a, b)]
        assert shared("block", one, other) == blocks
        assert shared("pair", one, other) == (blocks and sources[0] == sources[1])
        assert shared("donor", one, other) == bool(a.target and b.target and a.target.donor == b.target.donor)
        lowered = a.target is not None and a.target.plain is not a.target
        assert shared("form", one, other) == (lowered and a.target == b.target)
        joined = [e.stitch and e.source and e.target and (e.source.donor, e.target.donor) for e in (a, b)]
        assert shared("donors", one, other) == (joined[0] == joined[1] and bool(joined[0]))
    joints, level = groups["stitches"].values, groups["level"].values
    assert joints is not None and level is not None
    for place, edge in enumerate(edges):
        assert joints[place, 0] == (edge.stitch is not None)
        assert level[place, 0] == (edge.source is None)


def test_draws_are_other_losses_of_the_same_graph_and_come_again_under_the_seed() -> None:
    problem = random_problem(5, (5, 5, 5))
    learnt = problem.learn(Select(), random_knowledge(3, problem.learn(Select()), 8))
    one, two, three = (learnt.draw(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.loss, two.loss) and not np.array_equal(one.loss, three.loss)
    assert one.losses is learnt.losses and one.graph is learnt.graph
    assert np.isfinite(one.loss).all()


def test_assemblies_of_another_partition_are_left_out() -> None:
    problem = random_problem(7, (6, 6))
    foreign = Assembly(tuple(replace(block, last=block.last + 1) for block in problem.partition.blocks["d0"]))
    learnt = problem.learn(Select(), Knowledge((Evaluated(foreign, 0.9, latency(1.0)),)))
    assert foreign not in learnt.losses
    with pytest.raises(DercError, match="is not an assembly of this partition"):
        learnt.predict(foreign)


def test_a_table_of_another_partition_is_an_error() -> None:
    problem = random_problem(7, (6, 6))
    with pytest.raises(DercError, match="no block of this partition"):
        replace(problem, table=replace(problem.table, blocks={})).learn(Select())


def test_latencies_stay_positive() -> None:
    problem = random_problem(8, (5, 5))
    fast = {name: latency(1e-6) for name in problem.table.donors}
    learnt = replace(problem, table=replace(problem.table, donors=fast)).learn(Select())
    assert learnt.latency_ms is not None
    inner = [edge.target is not None for edge in learnt.graph.edges]
    assert (learnt.latency_ms[inner] > 0).all()


def test_the_margin_is_the_quantile_of_what_exceeded_its_prediction() -> None:
    table = table_of({}, {}, {})
    errors = {str(i): -i / 100 for i in range(11)} | {"slow": 0.4}
    assert margin_from(replace(table, errors=errors)) == pytest.approx(0.09)
    assert margin_from(replace(table, errors={"a": 0.3})) == table.noise == margin_from(table)


def test_refitting_is_deterministic() -> None:
    problem = random_problem(10, (5, 5, 5))
    learnt = problem.learn(Select())
    knowledge = random_knowledge(1, learnt, 10)
    one, two = problem.learn(Select(), knowledge), problem.learn(Select(), knowledge)
    assert np.array_equal(one.loss, two.loss)
    assert one.latency_ms is not None and np.array_equal(one.latency_ms, two.latency_ms)


def test_a_lower_precision_costs_its_distortion() -> None:
    problem = random_problem(0, (6, 5), lower=("int8",))
    learnt = problem.learn(Select())
    loss = prior_loss(learnt.graph, problem.cuts, problem.embedded, problem.table.distortion)
    for edge, place in ((edge, place) for place, edge in enumerate(learnt.graph.edges) if edge.target):
        plain = learnt.graph.places.get((edge.source, edge.target.plain))
        if edge.target.precision == "int8" and plain is not None:
            distortion = problem.table.distortion[str(edge.target)]
            assert loss[place] - loss[plain] == pytest.approx(0.001 + distortion)
    unknown = prior_loss(learnt.graph, problem.cuts, problem.embedded)
    assert (unknown[loss == loss] >= 0).all() and not np.array_equal(unknown, loss)


def test_a_bad_score_in_int8_is_held_against_int8_more_than_against_the_block() -> None:
    problem = random_problem(1, (5, 5), lower=("int8",))
    before = problem.learn(Select())
    mixed = [a for a in paths(before) if any(a.stitched) and [b.precision for b in a.blocks].count("int8") == 1]
    bad = next(a for a in mixed if before.graph.path(a.plain))
    after = problem.learn(Select(), Knowledge((Evaluated(bad, 1 - before.expected_loss(bad) - 0.3),)))
    (low,) = (block for block in bad.blocks if block.precision == "int8")
    change = after.loss - before.loss
    for place in before.graph.entering[low]:
        edge = before.graph.edges[place]
        plain = before.graph.places.get((edge.source, low.plain))
        if plain is not None:
            assert change[place] > change[plain] > 0
