"""Precision from the option to the bundle: what the search does with it, and one real compile."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import derc
from derc import bundle, layered
from derc.artifacts import LatencyTable
from derc.compiler import analyse
from derc.config import resolve
from derc.data import Data
from derc.passes.select import Select
from derc.pipeline import Context, Timings
from derc.search import Search
from derc.text import parse_graph
from tests.conftest import small_zoo
from tests.engines import Refusing
from tests.world import make_context
from tests.zoos import latency


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    made = make_context(tmp_path_factory.mktemp("store"), "resnet", "vit")
    return replace(made, engine=Refusing(threads=1), precisions=("fp32", "int8"))


@pytest.fixture
def search(context) -> Search:
    """A search over two donors of which the budget admits only what is int8 in three blocks of four."""
    timings = Timings()
    found = analyse(context, resolve({}, {}, None), timings)
    blocks, distortion = {}, {}
    for block in (block for chain in found.partition.blocks.values() for block in chain):
        low = str(replace(block, precision="int8"))
        blocks |= {str(block): latency(1.0), low: latency(0.5)}
        distortion[low] = 0.01 if block.set == 0 else 0.02
    stitches = {e.stitch: latency(2.0) for e in layered.build(found.cuts, found.partition).edges if e.stitch}
    table = LatencyTable("cpu", {}, dict.fromkeys(("resnet", "vit"), latency(4.0)), blocks, stitches, 0.01, distortion)
    select = Select(latency_ms=2.9, top=4, heads=("resnet", "vit"))
    return Search(context, select, found.cuts, found.embedded, found.partition, table, 6, timings)


def test_what_the_engine_cannot_compute_is_left_out_and_the_search_goes_on(search):
    search.run()
    assert search.failed and all("overflows" in why for why in search.failed.values())
    assert not search.failed.keys() & search.judged.keys()
    assert search.spent <= 6
    failed = {one.assembly for one in search.knowledge.evaluated if one.score == 0.0}
    assert failed >= search.failed.keys()
    assert search.best() is None or search.best().assembly in search.judged


def test_forms_of_one_network_share_its_stitches(search):
    search.run()
    for assembly, one in search.judged.items():
        assert one.assembly == assembly
        assert len(one.stitched.states) == sum(assembly.stitched)


def test_a_donor_of_which_a_block_could_not_be_built_is_no_candidate(search, capsys):
    table = search.table
    lost = str(search.partition.blocks["vit"][1])
    search.table = replace(table, blocks={name: ms for name, ms in table.blocks.items() if name != lost})
    search.run()
    assert {a.donors for a in search.judged if a.intact} == {("resnet",)}
    assert all(lost not in map(str, a.blocks) for a in (*search.judged, *search.failed))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A compile for less memory than any donor takes in float32."""
    folder = tmp_path_factory.mktemp("mixed")
    zoo = small_zoo(folder, "resnet-slim", "vit-patch8")
    options = {"evaluations": 3, "top": 3, "probe": 64, "profile_s": 4, "threads": 1}
    result = derc.compile(str(zoo), "digits", memory_mb=0.2, precision="fp32,int8", out=folder / "out", **options)
    return folder / "out", result


def test_the_answer_has_blocks_in_int8_and_fits(compiled):
    folder, result = compiled
    precisions = [block["precision"] for block in result["selected"]["blocks"]]
    assert "int8" in precisions and result["selected"]["memory_mb"] <= 0.2
    assert result["latency"]["provenance"] == "measured"
    assert result["accuracy"]["of"] == "engine"
    assert result["parity"]["relative"] and result["parity"]["agreement"] >= result["parity"]["least_agreement"]
    assert "--precision fp32,int8" in (folder / "reproduce.sh").read_text()
    assert json.loads((folder / "manifest.json").read_text())["selected"]["blocks"][0]["donor"] == "vit-patch8"


def test_its_accuracy_is_that_of_the_engine_that_is_shipped(compiled):
    folder, result = compiled
    session = onnxruntime.InferenceSession(folder / "engine.onnx", providers=["CPUExecutionProvider"])
    images, labels = next(iter(Data.load("digits").heldout.batches(10_000)))
    name = session.get_inputs()[0].name
    answers = np.concatenate([session.run(None, {name: row[None].numpy()})[0] for row in images]).argmax(1)
    right = (answers == labels.numpy()).mean()
    assert result["accuracy"]["heldout"] == pytest.approx(right, abs=2 / len(answers))


def test_its_onnx_is_quantised_where_the_plan_says_so_and_its_module_is_float32(compiled):
    folder, result = compiled
    kinds = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert "QuantizeLinear" in kinds
    assert "@int8" in (folder / "plan.txt").read_text()
    parse_graph((folder / "plan.txt").read_text()).verify()
    assert "int8 computes" in (folder / "model.py").read_text()
    network = derc.load(folder)
    assert all(value.dtype == torch.float32 for value in network.parameters())
    assert bundle.verify(folder)["failed"] == {}
    assert sum(p.numel() for p in network.parameters()) == result["selected"]["params"]
