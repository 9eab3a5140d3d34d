"""Latency tables as files: what comes back, what is refused, and what they are used for."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from derc import portable, tables
from derc.artifacts import Assembly, BlockRef, CutDonor, Evaluated, Latency, LatencyTable, Unit
from derc.bundle import seal
from derc.errors import DercError, IntegrityError, UsageError
from derc.ir import Layout, TensorType, Value
from derc.recorded import Wanted, calibrations, foresee, look_up, samples
from derc.roofline import UNCALIBRATED, Calibration
from derc.shelf import Shelf
from derc.tables import exporter_versions, parse, read, samples_path, span, text, write
from derc.target import Target
from derc.workload import Work
from tests.world import make_context

A100 = Target.load("a100")
DIGESTS = {"a": "a1" * 32, "b": "b2" * 32}
CUTS = {
    name: CutDonor(tuple(Value(f"{name}{i}", TensorType((4,), Layout.NC)) for i in range(5)), (Unit(1, 1, 1, 1),) * 4)
    for name in "ab"
}
SPANS = {(name, i): BlockRef(name, 2 * i, 2 * i + 2, i) for name in "ab" for i in range(2)}
REFS = {str(block): block for block in SPANS.values()}
LOWER = replace(SPANS["a", 0], precision="int8")
STITCH = "NC4>NC4"
WORKS = {
    name: Work(10 + i, 10**7 * (i + 1), 10**5, 10**6) for i, name in enumerate([*DIGESTS, *REFS, str(LOWER), STITCH])
}
NETWORK = Assembly((SPANS["a", 0], SPANS["b", 1]))
SECONDS = np.random.default_rng(0).uniform(1e-3, 2e-3, 100)


def latency(ms: float) -> Latency:
    return Latency(ms, ms * 0.99, ms * 1.01, samples=100)


def measured(**changes) -> LatencyTable:
    """A table of all parts, its figures without any short decimal form."""
    table = LatencyTable(
        "a100",
        {"engine": "tensorrt", "tensorrt": "11.0"},
        {name: latency(np.pi + i) for i, name in enumerate(DIGESTS)},
        {name: latency(np.e + i) for i, name in enumerate([*REFS, str(LOWER)])},
        {STITCH: latency(1 / 3), "NC4>NC5": replace(latency(1 / 7), provenance="predicted", samples=0)},
        0.001234567890123,
        distortion={str(LOWER): 0.01},
        failed={"b[0:2]@int8": "it crashed"},
        networks=(Evaluated(NETWORK, None, latency(7.1)),),
        errors={str(NETWORK): -0.02},
        samples={"donor a": SECONDS, "block a[0:2]": SECONDS[:20]},
    )
    return replace(table, **changes)


def made(
    table: LatencyTable | None = None, target: Target = A100, digests=DIGESTS, created="2026-11-25T10:00:00+00:00"
):
    return portable.describe(
        table or measured(),
        target,
        digests=digests,
        cuts=CUTS,
        works=WORKS,
        machine={"gpu": "NVIDIA A100-SXM4-40GB", "driver": "580.1"},
        options={"precision": 0.01, "limit_s": 60},
        created=created,
    )


def wanted(blocks=REFS, digests=DIGESTS, stitches=(STITCH,)) -> Wanted:
    return Wanted(digests, CUTS, blocks, stitches)


def changed(table, **fields) -> str:
    """The table's text with fields changed, under a new seal."""
    return json.dumps(seal({**json.loads(text(table)), **fields}))


def test_what_is_written_comes_back_exactly(tmp_path):
    table, path = made(), tmp_path / "table.json"
    write(table, path, measured().samples)
    assert read(path) == table
    assert text(read(path)) == path.read_text() == text(table)
    source = measured()
    for entry in table.entries:
        kind = {"donor": source.donors, "block": source.blocks, "stitch": source.stitches}[entry.kind]
        assert entry.latency(entry.provenance) == kind[entry.name]
    assert table.noise == source.noise and table.device == A100.device
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_raw_samples_stand_beside_it_in_order_of_time(tmp_path):
    write(made(), tmp_path / "t.json", measured().samples)
    lines = [json.loads(line) for line in samples_path(tmp_path / "t.json").read_text().splitlines()]
    assert {line["name"]: line["seconds"] for line in lines} == {k: v.tolist() for k, v in measured().samples.items()}
    with pytest.raises(UsageError, match="cannot be written"):
        write(made(), tmp_path / "no" / "t.json")


def test_percentiles_only_where_there_are_samples_enough():
    assert [list(portable.percentiles(range(1, n + 1))) for n in (10, 11, 63, 64, 661, 662)] == [
        [], ["p50"], ["p50"], ["p50", "p90"], ["p50", "p90"], ["p50", "p90", "p99"],
    ]  # fmt: skip
    assert portable.percentiles([0.001 * i for i in range(100, 0, -1)])["p90"] == pytest.approx(90)
    by_name = {entry.name: entry for entry in made().entries}
    assert by_name["a"].percentiles_ms["p50"] == pytest.approx(1e3 * np.quantile(SECONDS, 0.5, method="inverted_cdf"))
    assert set(by_name["a[0:2]"].percentiles_ms) == {"p50"} and by_name["b"].percentiles_ms == {}


def leaves(tree, path=()):
    """Paths of all values in a JSON tree that are no containers."""
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from leaves(tree[key], (*path, key))
    else:
        yield path


def test_any_value_that_was_changed_is_found():
    plain = json.loads(text(made()))
    paths = list(leaves(plain))
    assert len(paths) > 180
    for path in paths:
        tree = json.loads(json.dumps(plain))
        spot = tree
        for key in path[:-1]:
            spot = spot[key]
        old = spot[path[-1]]
        spot[path[-1]] = (not old) if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else f"{old}x"
        with pytest.raises(IntegrityError) as caught:
            parse(json.dumps(tree), "t.json")
        assert "\n" not in str(caught.value) and "t.json" in str(caught.value)


def test_any_field_that_is_missing_or_too_much_is_found():
    plain = json.loads(text(made()))
    for key in plain:
        with pytest.raises(IntegrityError):
            parse(
                json.dumps(
                    seal({k: v for k, v in plain.items() if k != key})
                    if key != "seal"
                    else {k: v for k, v in plain.items() if k != key}
                ),
                "t",
            )
    for key in plain["entries"][0]:
        if key not in ("percentiles_ms", "work"):
            entries = [{k: v for k, v in plain["entries"][0].items() if k != key}, *plain["entries"][1:]]
            with pytest.raises(IntegrityError, match=f"entries.0.{key}"):
                parse(changed(made(), entries=entries), "t")
    with pytest.raises(IntegrityError, match="surprise"):
        parse(changed(made(), surprise=1), "t")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    whole = text(made())
    (tmp_path / "t.json").write_text(whole[: int(share * (len(whole) - 3))])
    with pytest.raises(IntegrityError, match="is not a whole latency table"):
        read(tmp_path / "t.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, "3", None])
def test_numbers_that_no_latency_is_are_refused_under_a_right_seal(value):
    entries = json.loads(text(made()))["entries"]
    with pytest.raises(IntegrityError, match=r"NaN|Infinity|entries.0.ms"):
        parse(changed(made(), entries=[{**entries[0], "ms": value}, *entries[1:]]), "t")


def test_other_faults_under_a_right_seal():
    table, entries = made(), json.loads(text(made()))["entries"]
    with pytest.raises(IntegrityError, match="schema 2, this derc reads 1"):
        parse(changed(table, schema=2), "t")
    with pytest.raises(IntegrityError, match="does not hold the median"):
        parse(changed(table, entries=[{**entries[0], "low_ms": 9.9}, *entries[1:]]), "t")
    with pytest.raises(IntegrityError, match="donor a stands there twice"):
        parse(changed(table, entries=[*entries, entries[0]]), "t")
    with pytest.raises(IntegrityError, match="the key of block a"):
        parse(changed(table, entries=[*entries[:2], {**entries[2], "key": entries[3]["key"]}]), "t")
    with pytest.raises(IntegrityError, match="of no donor that the table lists"):
        parse(changed(table, entries=[{**entries[2], "name": "c[0:2]"}]), "t")
    with pytest.raises(IntegrityError, match="not within the 5 cuts"):
        parse(changed(table, entries=[{**entries[2], "name": "a[0:9]"}]), "t")
    with pytest.raises(IntegrityError, match="changed after it was written"):
        parse(text(table).replace('"driver": "580.1"', '"driver": "580.2"'), "t")
    with pytest.raises(IntegrityError, match="is not a latency table of derc"):
        parse("[1, 2]", "t")
    with pytest.raises(UsageError, match="cannot be read"):
        read(tables.Path("/nowhere/t.json"))


def test_keys_hold_everything_that_a_block_is():
    key = tables.block_key("a" * 64, (0, 2), ("x", "y"), "fp32", 1, {"torch": "2"})
    others = [
        tables.block_key("b" * 64, (0, 2), ("x", "y"), "fp32", 1, {"torch": "2"}),
        tables.block_key("a" * 64, (0, 3), ("x", "y"), "fp32", 1, {"torch": "2"}),
        tables.block_key("a" * 64, (0, 2), ("x", "z"), "fp32", 1, {"torch": "2"}),
        tables.block_key("a" * 64, (0, 2), ("x", "y"), "int8", 1, {"torch": "2"}),
        tables.block_key("a" * 64, (0, 2), ("x", "y"), "fp32", 2, {"torch": "2"}),
        tables.block_key("a" * 64, (0, 2), ("x", "y"), "fp32", 1, {"torch": "3"}),
    ]
    assert len({key, *others}) == 7
    assert all("+" not in version for version in exporter_versions().values())
    assert span("res.net-1[10:12]@int8") == ("res.net-1", 10, 12, "int8")
    with pytest.raises(ValueError, match="not the name of a block"):
        span("resnet")


def test_a_table_of_the_same_donors_and_partition_is_recorded():
    blocks = {**REFS, str(LOWER): LOWER, "b[0:2]@int8": replace(SPANS["b", 0], precision="int8")}
    found = foresee(A100, wanted(blocks), WORKS | {"b[0:2]@int8": Work(1, 1, 1, 1)}, [made()])
    source = measured()
    as_recorded = {name: replace(value, provenance="recorded") for name, value in source.blocks.items()}
    assert found.table.blocks == as_recorded, "the block that could not be built there is in no table"
    assert found.table.failed == source.failed and found.table.distortion == source.distortion
    assert found.table.stitches == {STITCH: replace(source.stitches[STITCH], provenance="recorded")}
    assert {latency.provenance for latency in found.table.donors.values()} == {"recorded"}
    (network,) = found.table.networks
    assert network.assembly == NETWORK and network.latency == replace(latency(7.1), provenance="recorded")
    assert found.table.errors == source.errors and found.table.noise == source.noise
    assert found.table.engine == source.engine
    assert len(found.notes) == 1 and "NVIDIA A100-SXM4-40GB" in found.notes[0]


def test_another_partition_is_predicted_by_what_was_measured():
    other = BlockRef("a", 0, 3, 0)
    blocks = {str(other): other, **{name: ref for name, ref in REFS.items() if ref.donor == "b"}}
    tables_ = [made()]
    found = foresee(A100, wanted(blocks), {**WORKS, str(other): Work(20, 10**8, 0, 10**7)}, tables_)
    got = found.table.blocks[str(other)]
    plain, _ = calibrations(A100, tables_)
    assert got == plain.predict(Work(20, 10**8, 0, 10**7), A100.known) and got.provenance == "predicted"
    assert got.low_ms < got.ms < got.high_ms
    assert [found.table.blocks[name].provenance for name in list(blocks)[1:]] == ["recorded"] * 2
    assert found.table.networks == (), "a network of blocks that are not of this partition says nothing"
    assert any("a[0:3]: of a the table has a[0:2], a[2:4]" in note for note in found.notes)
    assert any("1 of 6 latencies are predicted" in note for note in found.notes)
    with pytest.raises(DercError, match=r"the work of a\[0:3\] is not known"):
        foresee(A100, wanted(blocks), WORKS, tables_)


def test_other_weights_of_the_same_architecture_are_refused():
    other = {**DIGESTS, "b": "c3" * 32}
    with pytest.raises(UsageError, match=r"another donor called b: its weights.*b2b2b2.*c3c3c3") as caught:
        look_up([made()], A100, wanted(digests=other))
    assert "\n" not in str(caught.value)
    renewed = made(digests=other, created="2026-11-26T10:00:00+00:00")
    found = look_up([made(), renewed], A100, wanted(digests=other))
    assert not found.missing and renewed in found.tables
    assert look_up([made()], replace(A100, batch=2), wanted(digests=other)).latencies == {}, (
        "it is another table's batch"
    )


@pytest.mark.parametrize(
    "target", [replace(A100, engine="onnxruntime:cuda"), replace(A100, batch=4), Target.load("h100")]
)
def test_a_table_of_another_target_engine_or_batch_is_not_recorded(target):
    found = foresee(target, Wanted(DIGESTS, CUTS, REFS, (STITCH,), target.batch), WORKS, [made()])
    every = [*found.table.donors.values(), *found.table.blocks.values(), *found.table.stitches.values()]
    assert {latency.provenance for latency in every} == {"predicted"}
    assert any("no table of this target, engine, batch size and threads" in note for note in found.notes)
    assert found.calibration.entries == len(samples([made()])), "its factors serve all the same"


def test_without_any_table_everything_is_predicted_with_a_wide_interval():
    found = foresee(A100, wanted(), WORKS, [])
    assert found.calibration == Calibration()
    for latency in found.table.blocks.values():
        assert (latency.low_ms * UNCALIBRATED, latency.high_ms / UNCALIBRATED) == pytest.approx((latency.ms,) * 2)
    assert found.table.engine == {"engine": "tensorrt"} and "public figures" in found.notes[0]


def test_the_newest_of_two_tables_wins_and_versions_are_named(monkeypatch):
    old, new = made(), made(measured(donors={n: latency(1.5) for n in DIGESTS}), created="2026-11-26T10:00:00+00:00")
    assert look_up([new, old], A100, wanted()).latencies["donor", "a"].ms == 1.5
    assert look_up([old, new], A100, wanted()).latencies["donor", "a"].ms == 1.5
    monkeypatch.setattr("derc.recorded.exporter_versions", lambda: {**exporter_versions(), "torch": "9.9"})
    torch = exporter_versions()["torch"]
    assert (
        look_up([old], A100, wanted()).missing["block", "a[0:2]"]
        == f"exported by other versions (torch {torch} there, 9.9 here)"
    )


def test_the_shelf_keeps_tables_by_their_content(tmp_path):
    shelf, path = Shelf(tmp_path / "store"), tmp_path / "t.json"
    with pytest.raises(UsageError, match="none was imported"):
        shelf.find("a100")
    write(made(), path, measured().samples)
    name, table = shelf.add(path)
    assert shelf.add(path) == (name, table) and shelf.tables() == {name: table} and table.seal.startswith(name)
    assert shelf.find("a100") == shelf.find(name[:6]) == (name, table)
    assert shelf.export("a100", tmp_path / "again.json") == name
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert samples_path(tmp_path / "again.json").read_bytes() == samples_path(path).read_bytes()
    write(made(created="2026-11-26T10:00:00+00:00"), path)
    other, _ = shelf.add(path)
    with pytest.raises(UsageError, match="may be any of the tables"):
        shelf.find("a100")
    with pytest.raises(UsageError, match=r"no latency table 'a10'.*did you mean 'a100'"):
        shelf.find("a10")
    assert shelf.remove(other) == other and shelf.names() == [name]
    shelf.path(name).write_text(text(table).replace("580.1", "580.9"))
    with pytest.raises(IntegrityError, match="changed after it was written"):
        shelf.tables()


def test_a_zoo_profiled_here_is_recorded_elsewhere(tmp_path):
    from derc.passes.cut import CutDonors
    from derc.passes.embed import Embed
    from derc.passes.lower import Lower
    from derc.passes.partition import PartitionZoo
    from derc.passes.profile import Profile
    from derc.tabling import foresee as foresee_zoo
    from derc.tabling import table_file

    context = make_context(tmp_path / "store", "resnet", "vit", probe=16)
    cuts = CutDonors().run(context, Lower().run(context))
    partition = PartitionZoo(blocks=3).run(context, cuts, Embed().run(context, cuts))
    table = Profile(limit_s=3.0, networks=2, max_stitches=4).run(context, cuts, partition)
    write(table_file(context, cuts, partition, table, 3.0), tmp_path / "t.json", table.samples)
    Shelf(context.store.root).add(tmp_path / "t.json")
    found = foresee_zoo(context, cuts, partition)
    assert {name: value.ms for name, value in found.table.blocks.items()} == {n: v.ms for n, v in table.blocks.items()}
    assert {value.provenance for value in (*found.table.blocks.values(), *found.table.donors.values())} == {"recorded"}
    assert {n.assembly for n in found.table.networks} == {n.assembly for n in table.networks}
    other = PartitionZoo(blocks=2).run(context, cuts, Embed().run(context, cuts))
    assert {value.provenance for value in foresee_zoo(context, cuts, other).table.blocks.values()} >= {"predicted"}
    donors = tuple(replace(donor, mean=(0.1,) * 3) for donor in context.zoo.donors)
    with pytest.raises(UsageError, match="another donor called resnet"):
        foresee_zoo(replace(context, zoo=replace(context.zoo, donors=donors)), cuts, partition)
