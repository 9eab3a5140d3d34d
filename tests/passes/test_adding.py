"""What blocks add to NASWOT, against NASWOT itself of intact donors and of stitched networks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.stats import spearmanr

from derc.artifacts import Assembly, Knowledge
from derc.assembled import live
from derc.layered import build
from derc.learnt import prior_loss
from derc.passes.adding import AddingParts, naswot_parts
from derc.passes.cut import CutDonors
from derc.passes.embed import Embed
from derc.passes.lower import Lower
from derc.passes.partition import PartitionZoo
from derc.passes.select import Select
from derc.passes.stitch import FitStitches
from derc.scoring.codes import Naswot, block_kernels, naswot
from tests.world import make_context

FAMILIES = ("resnet", "vit", "convnext")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    context = make_context(tmp_path_factory.mktemp("store"), *FAMILIES, probe=96)
    cuts = CutDonors().run(context, Lower().run(context))
    embedded = Embed().run(context, cuts)
    return context, cuts, embedded, PartitionZoo(blocks=3).run(context, cuts, embedded)


def test_kernels_of_blocks_add_up_to_the_donors(world):
    context, _, _, partition = world
    for name, chain in partition.blocks.items():
        lowered = context.lowered[name]
        modules = [lowered.block(block.first, block.last).eval() for block in chain]
        kernels = block_kernels(modules, context.data.probe, Naswot())
        whole = [np.linalg.slogdet(np.sum(batch, axis=0))[1] for batch in zip(*kernels, strict=True)]
        want = naswot(lowered.program, context.data.probe, Naswot().images, Naswot().batch)
        assert len(whole) == 3 and np.mean(whole) == pytest.approx(want, rel=1e-6)


def test_the_prior_ranks_networks_as_naswot_does(world):
    context, cuts, embedded, partition = world
    parts = naswot_parts(context, partition)
    graph = build(cuts, partition, one_per_set=True)
    loss = prior_loss(graph, cuts, replace(embedded, parts=parts.parts))
    expected, true = [], []
    for names in product(FAMILIES, repeat=3):
        assembly = Assembly(tuple(partition.blocks[name][place] for place, name in enumerate(names)))
        path = graph.path(assembly)
        if path is None:
            continue
        network = live(FitStitches().run(context, assembly), context.lowered)
        true.append(naswot(network, context.data.probe, Naswot().images, Naswot().batch))
        expected.append(-loss[list(path)].sum())
    assert len(true) > 15 and spearmanr(expected, true).statistic > 0.8


def test_leaving_out_a_set_costs_what_its_best_block_adds(world):
    context, cuts, embedded, partition = world
    parts = naswot_parts(context, partition).parts
    graph = build(cuts, partition)
    loss = prior_loss(graph, cuts, replace(embedded, parts=parts))
    best = [max(parts[str(chain[place])] for chain in partition.blocks.values()) for place in range(3)]
    for place, edge in enumerate(graph.edges):
        own = best[edge.target.set] - parts[str(edge.target)] if edge.target else 0.0
        assert loss[place] == pytest.approx(own + edge.skipped * np.mean(best)) and loss[place] >= 0


def test_other_objectives_have_no_parts_and_the_prior_of_the_stitches(world):
    context, cuts, embedded, partition = world
    assert AddingParts().run(context, partition).parts == {}
    paper = replace(context, objective="naswot")
    parts = AddingParts().run(paper, partition).parts
    assert set(parts) == {str(block) for chain in partition.blocks.values() for block in chain}
    assert AddingParts().inputs(context) != AddingParts().inputs(paper)
    known = Knowledge((), accurate=False)
    usual = Select().learn(cuts, embedded, partition, None, known)
    other = Select().learn(cuts, replace(embedded, parts=parts), partition, None, known)
    assert not np.allclose(usual.loss, other.loss)
