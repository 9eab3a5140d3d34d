"""The store: whole entries or none, damage seen, and no surprise where it cannot write."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from derc.artifacts import BlockRef, CutId, EmbeddedZoo, Latency, LatencyTable, Partition, digest
from derc.errors import DercError, IntegrityError
from derc.store import Store

KEY, OTHER = digest("a key"), digest("another")


def embedded(seed: int = 0, size: int = 3) -> EmbeddedZoo:
    index = tuple(CutId("donor", i) for i in range(size))
    return EmbeddedZoo(index, np.random.default_rng(seed).random((size, size)), 8, "linear", {"donor": 0.5})


def same(a: EmbeddedZoo, b: EmbeddedZoo) -> bool:
    return digest(a) == digest(b)


def files(store: Store, key: str = KEY) -> list[Path]:
    return sorted((store.root / "entries" / key[:2] / key).iterdir())


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", say=pytest.fail)


@pytest.fixture
def frozen():
    """A store with one entry that this process may read and not write, enforced by the kernel."""
    root = Path(tempfile.mkdtemp()) / "store"
    Store(root).put(KEY, embedded())
    root.parent.chmod(0o755)
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(65534)
    try:
        yield root
    finally:
        if privileged:
            os.seteuid(0)
        for folder in folders:
            folder.chmod(0o755)
        shutil.rmtree(root.parent)


def test_absent_is_none(store):
    assert store.get(KEY, EmbeddedZoo) is None
    assert store.get_bytes(KEY) is None
    assert store.entries() == [] and store.verify() == []


def test_put_replaces(store):
    store.put(KEY, embedded(1), note="first")
    store.put(KEY, embedded(2), note="second")
    assert same(store.get(KEY, EmbeddedZoo), embedded(2))
    (entry,) = store.entries()
    assert (entry.key, entry.kind, entry.note) == (KEY, "EmbeddedZoo", "second")
    assert entry.size == sum(file.stat().st_size for file in files(store) if file.name != "meta.json")


def test_bytes(store):
    store.put_bytes(KEY, b"\x00onnx", note="export")
    assert store.get_bytes(KEY) == b"\x00onnx"


names = st.text("abcdef_", min_size=1, max_size=4)
finite = st.floats(allow_nan=False, allow_infinity=False)
latencies = st.builds(Latency, finite, finite, finite, st.sampled_from(["measured", "predicted"]), st.integers(0, 9))
tables = st.builds(
    LatencyTable,
    target=names,
    engine=st.dictionaries(names, names),
    donors=st.dictionaries(names, latencies, max_size=3),
    blocks=st.dictionaries(names, latencies, max_size=3),
    stitches=st.dictionaries(names, latencies, max_size=3),
    noise=finite,
)
refs = st.builds(BlockRef, names, st.integers(0, 5), st.integers(6, 9), st.integers(0, 3))
partitions = st.builds(
    Partition,
    st.dictionaries(names, st.lists(refs, max_size=3).map(tuple)),
    finite,
    st.none() | finite,
    st.dictionaries(names, finite),
)
zoos = hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64, np.bool_]), hnp.array_shapes(max_dims=3)).map(
    lambda array: EmbeddedZoo((CutId("d", 0),), array, 1, "linear")
)


@settings(max_examples=40, deadline=None)
@given(artifact=tables | partitions | zoos)
def test_round_trip(tmp_path_factory, artifact):
    store = Store(tmp_path_factory.mktemp("store"))
    store.put(KEY, artifact)
    assert digest(store.get(KEY, type(artifact))) == digest(artifact)


@pytest.mark.parametrize("name", ["meta.json", "artifact.json", "arrays.safetensors"])
def test_every_flipped_bit_is_caught(store, name):
    store.put(KEY, embedded(size=2))
    path = next(file for file in files(store) if file.name == name)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        with pytest.raises(IntegrityError, match=KEY):
            store.get(KEY, EmbeddedZoo)
    assert [key for key, _ in store.verify()] == [KEY]


@pytest.mark.parametrize("name", ["meta.json", "artifact.json", "arrays.safetensors"])
@pytest.mark.parametrize("harm", [lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink()])
def test_truncated_or_missing_is_caught(store, name, harm):
    store.put(KEY, embedded())
    harm(next(file for file in files(store) if file.name == name))
    with pytest.raises(IntegrityError, match="derc cache"):
        store.get(KEY, EmbeddedZoo)


def test_damage_is_reported_and_made_anew(tmp_path):
    heard: list[str] = []
    store = Store(tmp_path, on_damage=heard.append)
    store.put(KEY, embedded())
    files(store)[0].write_bytes(b"rubbish")
    assert store.get(KEY, EmbeddedZoo) is None
    assert len(heard) == 1 and KEY in heard[0] and "made anew" in heard[0]
    assert store.entries() == []
    store.put(KEY, embedded())
    assert same(store.get(KEY, EmbeddedZoo), embedded()) and len(heard) == 1


def test_an_entry_of_another_kind_is_damage(store):
    store.put_bytes(KEY, b"x")
    with pytest.raises(IntegrityError, match="holds a bytes"):
        store.get(KEY, EmbeddedZoo)


def test_a_key_cannot_leave_the_store(store):
    with pytest.raises(DercError, match="not a store key"):
        store.get_bytes("../../etc/passwd")


def test_read_only_store_serves_and_says_so_once(frozen):
    heard: list[str] = []
    store = Store(frozen, say=heard.append)
    assert same(store.get(KEY, EmbeddedZoo), embedded())
    store.put(OTHER, embedded(1))
    store.put_bytes(OTHER, b"x")
    assert store.get(OTHER, EmbeddedZoo) is None
    assert len(heard) == 1 and "nothing will be kept" in heard[0]
    with pytest.raises(DercError, match="cannot be written"):
        store.gc(everything=True)


def test_store_that_cannot_be_created(frozen):
    heard: list[str] = []
    store = Store(frozen / "inside", say=heard.append)
    store.put(KEY, embedded())
    assert store.get(KEY, EmbeddedZoo) is None and store.entries() == [] and len(heard) == 1


def test_store_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    heard: list[str] = []
    store = Store(tmp_path / "file" / "store", say=heard.append)
    store.put(KEY, embedded())
    assert store.get(KEY, EmbeddedZoo) is None and len(heard) == 1


@pytest.mark.parametrize("when", range(12))
def test_interrupt_leaves_the_old_entry_or_the_new_one(store, monkeypatch, when):
    """Ctrl-C at the n-th file operation of a put: what is read afterwards is whole, or absent."""
    store.put(KEY, embedded(1))
    calls = iter(range(1000))

    def interrupting(real):
        def call(*args, **kwargs):
            if next(calls) == when:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupting(os.fsync))
        patch.setattr(Path, "replace", interrupting(Path.replace))
        patch.setattr(Path, "open", interrupting(Path.open))
        with suppress(KeyboardInterrupt):
            store.put(KEY, embedded(2))
    found = store.get(KEY, EmbeddedZoo)
    assert found is None or same(found, embedded(1)) or same(found, embedded(2))
    assert store.verify() == [] and list((store.root / "tmp").iterdir()) == []


def _put_often(root: str, seed: int) -> None:
    store = Store(Path(root))
    for turn in range(15):
        store.put(KEY, embedded(seed * 100 + turn, size=40))
        assert store.get(KEY, EmbeddedZoo) is not None


def test_concurrent_puts_from_two_processes(store):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_put_often, args=(str(store.root), seed)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert any(same(store.get(KEY, EmbeddedZoo), embedded(seed * 100 + 14, size=40)) for seed in (1, 2))
    assert store.verify() == []


def test_gc_by_size_age_and_damage(store, monkeypatch):
    keys = [digest(i) for i in range(4)]
    for day, key in enumerate(keys):
        monkeypatch.setattr("derc.store.time.time", lambda day=day: day * 86400.0)
        store.put_bytes(key, bytes(100))
    assert store.gc() == (0, 0)
    assert store.gc(older_than_days=2.5) == (1, 100)
    assert store.gc(max_bytes=250) == (1, 100)
    assert [entry.key for entry in store.entries()] == keys[2:]
    files(store, keys[3])[0].write_bytes(b"rubbish")
    assert store.gc()[0] == 1
    assert store.gc(everything=True) == (1, 100)
    assert store.entries() == []


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.delenv("DERC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store.default().root == tmp_path / "xdg" / "derc"
    monkeypatch.setenv("DERC_CACHE", str(tmp_path / "own"))
    assert Store.default().root == tmp_path / "own"
