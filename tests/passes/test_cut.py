"""Cuts are exactly the values that every path passes through."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import derc
from derc.ir import Graph, Layout, Op, TensorType, Value
from derc.passes.cut import LEAST_UNITS, dominators, find_cuts
from tests.networks import make

KIND = TensorType((4, 2, 2), Layout.NCHW)


def random_graph(edges: list[list[int]], macs: list[int]) -> Graph:
    """A graph in which op i reads the ops (or the input, 0) that edges[i] names."""
    ops = []
    for index, (sources, cost) in enumerate(zip(edges, macs, strict=True), start=1):
        inputs = tuple(dict.fromkeys(f"v{source % index}" for source in sources))
        ops.append(Op(f"v{index}", "call_function", "f", inputs, KIND, macs=cost, params=cost))
    return Graph("random", Value("v0", KIND), tuple(ops), f"v{len(ops)}")


graphs = st.integers(1, 12).flatmap(
    lambda n: st.builds(
        random_graph,
        st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=3), min_size=n, max_size=n),
        st.lists(st.integers(0, 100), min_size=n, max_size=n),
    )
)


@given(graphs)
@settings(deadline=None)
def test_dominators_are_what_all_paths_share(graph):
    paths = list(nx.all_simple_paths(graph.networkx(), graph.input.name, graph.output))
    shared = set.intersection(*map(set, paths))
    assert set(dominators(graph)) == shared


@given(graphs)
@settings(deadline=None)
def test_units_share_out_all_costs_that_reach_the_output(graph):
    found = find_cuts(graph)
    needed = nx.ancestors(graph.networkx(), graph.output) | {graph.output}
    assert sum(unit.macs for unit in found.units) == sum(op.macs for op in graph.ops if op.name in needed)
    assert sum(unit.params for unit in found.units) == sum(op.params for op in graph.ops if op.name in needed)
    assert found.cuts[0].name == graph.input.name
    assert found.cuts[-1].name == graph.output


@given(graphs, st.floats(0.001, 0.3))
@settings(deadline=None)
def test_no_unit_is_negligible(graph, share):
    found = find_cuts(graph, share)
    macs = max(sum(unit.macs for unit in found.units), 1)
    params = max(sum(unit.params for unit in found.units), 1)
    assert len(found.units) <= LEAST_UNITS or all(
        unit.macs >= share * macs or unit.params >= share * params for unit in found.units
    )


@pytest.mark.parametrize(("family", "blocks"), [("resnet", 8), ("vit", 4), ("swin", 4), ("convnext", 5)])
def test_every_residual_block_ends_in_a_cut(family, blocks):
    assert len(derc.lower(make(family), (3, 32, 32)).units) >= blocks
