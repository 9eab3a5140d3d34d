"""The prediction of whole networks: against an explicit regression, on laws it should find, and its honest errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from derc import prediction
from derc.artifacts import Assembly, Evaluated
from derc.passes.select import Select
from derc.prediction import correct, parts_of, predict, wholes
from tests.layers import Problem, paths, random_problem
from tests.zoos import latency


def law(problem: Problem, joint: float, scale: float) -> dict[Assembly, float]:
    """Latencies of all assemblies of a device whose joints are worth `joint` ms each and whose blocks `scale` times."""
    learnt = problem.learn(Select())
    parts = parts_of(learnt.graph, problem.cuts, problem.table)
    edges = parts.own + joint * parts.features[:, 0] + (scale - 1) * parts.features[:, 3]
    return {a: float(edges[list(learnt.graph.path(a) or ())].sum()) for a in paths(learnt)}


def split(every: dict[Assembly, float], count: int) -> tuple[dict[Assembly, float], dict[Assembly, float]]:
    order = np.random.default_rng(0).permutation(len(every))
    items = list(every.items())
    return dict(items[i] for i in order[:count]), dict(items[i] for i in order[count:])


def error(problem: Problem, seen: dict[Assembly, float], unseen: dict[Assembly, float]) -> float:
    graph = problem.learn(Select()).graph
    edges = predict(graph, problem.cuts, problem.table, seen).latency_ms
    found = [abs(edges[list(graph.path(a) or ())].sum() / ms - 1) for a, ms in unseen.items()]
    return float(np.median(found))


def test_overheads_that_joints_save_are_found() -> None:
    problem = random_problem(0, (5, 5, 5, 5))
    fastest = min(latency.ms for latency in problem.table.blocks.values())
    seen, unseen = split(law(problem, -0.9 * fastest, 1.06), 24)
    assert error(problem, seen, unseen) < min(0.01, error(problem, {}, unseen) / 3)


def test_more_networks_predict_better() -> None:
    problem = random_problem(1, (5, 5, 5, 5))
    every = law(problem, -0.01, 0.95)
    noise = np.random.default_rng(0).normal(1, 0.02, len(every))
    noisy = {a: ms * factor for (a, ms), factor in zip(every.items(), noise, strict=True)}
    few, most = ({a: noisy[a] for a in split(every, count)[0]} for count in (4, 60))
    unseen = split(every, 60)[1]
    assert error(problem, most, unseen) < error(problem, few, unseen)


def test_corrections_are_those_of_the_explicit_regression() -> None:
    """Ridge over every coefficient, written out: features, blocks, stitched joints."""
    problem = random_problem(2, (4, 4, 4))
    learnt = problem.learn(Select())
    parts = parts_of(learnt.graph, problem.cuts, problem.table)
    known = list(split(law(problem, -0.01, 1.1), 12)[0].items())
    paths = [learnt.graph.path(assembly) or () for assembly, _ in known]
    taken = np.zeros((len(known), len(parts.own)))
    for row, path in enumerate(paths):
        taken[row, list(path)] = 1
    whole = np.array([ms for _, ms in known])
    columns = [parts.features[:, i] * parts.spreads[i] for i in range(5)]
    for number in range(int(parts.blocks.max()) + 1):
        columns.append((parts.blocks == number) * prediction.BLOCK_SPREAD * parts.features[:, 3])
    for place in np.flatnonzero(parts.stitched):
        columns.append((np.arange(len(parts.own)) == place) * prediction.EDGE_SPREAD * parts.features[:, 3])
    design = np.stack(columns, axis=1)
    rows = (taken @ design) / (prediction.NOISE * whole)[:, None]
    target = (whole - taken @ parts.own) / (prediction.NOISE * whole)
    weights = np.linalg.solve(rows.T @ rows + np.eye(rows.shape[1]), rows.T @ target)
    correction, errors = correct(parts, paths, whole)
    np.testing.assert_allclose(correction, design @ weights, atol=1e-9)
    for out in (0, 5, 11):
        rest = np.arange(12) != out
        without, _ = correct(parts, [paths[i] for i in np.flatnonzero(rest)], whole[rest])
        assert errors[out] == pytest.approx(float(taken[out] @ (parts.own + without)) / whole[out] - 1, abs=1e-9)


def test_nothing_known_leaves_the_sum() -> None:
    problem = random_problem(3, (4, 4))
    graph = problem.learn(Select()).graph
    found = predict(graph, problem.cuts, replace(problem.table, donors={}), {})
    assert found.errors == {}
    np.testing.assert_array_equal(found.latency_ms, parts_of(graph, problem.cuts, problem.table).own)


def test_the_table_s_own_networks_are_known() -> None:
    problem = random_problem(4, (5, 5, 5))
    learnt = problem.learn(Select())
    stitched = next(a for a in paths(learnt) if not a.intact)
    table = replace(problem.table, networks=(Evaluated(stitched, None, latency(3.0)),))
    assert wholes(table, learnt.graph)[stitched].ms == 3.0
    assert replace(problem, table=table).learn(Select()).predict(stitched)["latency_ms"] == 3.0
