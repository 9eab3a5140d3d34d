"""A lock admits the engine's own bytes on the device and versions that it was built for, and nothing else."""

from __future__ import annotations

import json

import pytest

from derc import enginelock
from derc.errors import IntegrityError, MissingDependencyError
from derc.registry import open_engine

HERE = {
    "engine": "tensorrt",
    "device": "NVIDIA A100",
    "compute_capability": "8.0",
    "tensorrt": "11.4.0",
    "driver": "580",
}
PLAN = bytes(range(256)) * 8


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "engine.plan"
    made = enginelock.lock(PLAN, HERE, "fp16", {"builder_optimization_level": "3"})
    enginelock.write(PLAN, path, made)
    return path


def test_what_was_written_is_read(path):
    assert enginelock.read(path, HERE) == PLAN
    assert sorted(file.name for file in path.parent.iterdir()) == ["engine.lock.json", "engine.plan"]
    made = enginelock.from_json(enginelock.place(path).read_bytes(), "lock")
    assert (
        made.precision == "fp16"
        and made.engine == HERE
        and made.bound == enginelock.BOUND["tensorrt"]
        and made.size == len(PLAN)
    )
    assert enginelock.to_json(made) == enginelock.place(path).read_bytes()


def test_a_tampered_engine(path):
    path.write_bytes(PLAN[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"engine\.plan is not what derc wrote: restore it, or build"):
        enginelock.read(path, HERE)


def test_a_truncated_engine(path):
    path.write_bytes(PLAN[:100])
    with pytest.raises(IntegrityError, match="is cut short, 100 of 2048 bytes"):
        enginelock.read(path, HERE)


@pytest.mark.parametrize("name", ["engine.plan", "engine.lock.json"])
def test_a_missing_file(path, name):
    (path.parent / name).unlink()
    with pytest.raises(IntegrityError, match=rf"{name} cannot be read \(No such file"):
        enginelock.read(path, HERE)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"device": "Tesla T4"}, "built for device NVIDIA A100, and this machine has Tesla T4: build"),
        ({"compute_capability": "7.5"}, "built for compute capability 8.0, and this machine has 7.5"),
        ({"tensorrt": "11.5.0"}, "built for tensorrt 11.4.0, and this machine has 11.5.0"),
    ],
)
def test_another_device_or_version(path, changed, sentence):
    with pytest.raises(MissingDependencyError, match=sentence) as caught:
        enginelock.read(path, HERE | changed)
    assert "\n" not in str(caught.value) and "derc build" in str(caught.value)


def test_an_entry_that_is_gone_does_not_agree(path):
    with pytest.raises(MissingDependencyError, match="this machine has unknown"):
        enginelock.read(path, {name: value for name, value in HERE.items() if name != "device"})


def test_what_is_recorded_only_may_differ(path):
    assert enginelock.read(path, HERE | {"driver": "590"}) == PLAN


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": 5},
        {"size": "5"},
        {"size": True},
        {"engine": {"device": 1}},
        {"engine": None},
        {"bound": "device"},
        {"more": 1},
        {"options": []},
    ],
)
def test_a_lock_that_is_none(path, change):
    tree = json.loads(enginelock.place(path).read_text()) | change
    enginelock.place(path).write_text(json.dumps(tree))
    with pytest.raises(IntegrityError, match=r"engine\.lock\.json is not an engine's lock"):
        enginelock.read(path, HERE)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00"])
def test_a_lock_of_garbage(path, text):
    enginelock.place(path).write_text(text)
    with pytest.raises(IntegrityError, match="is not an engine's lock"):
        enginelock.read(path, HERE)


def test_a_lock_of_another_schema(path):
    tree = json.loads(enginelock.place(path).read_text()) | {"schema": 2}
    enginelock.place(path).write_text(json.dumps(tree))
    with pytest.raises(IntegrityError, match="has lock schema 2, this derc reads 1"):
        enginelock.read(path, HERE)


@pytest.mark.parametrize("spec", list(enginelock.BOUND))
def test_what_binds_an_engine_is_in_its_description(spec):
    try:
        told = open_engine(spec).describe()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert enginelock.bound(told) == enginelock.BOUND[spec] and set(enginelock.BOUND[spec]) <= set(told)


def test_a_portable_engine_is_bound_to_nothing():
    made = enginelock.lock(b"x", {"engine": "openvino", "device": "this"}, "fp32")
    assert made.bound == () and enginelock.check(b"x", made, {"device": "that"}, "engine.zip") is None
    assert enginelock.bound({"engine": "onnxruntime", "variant": "openvino"}) == ()
