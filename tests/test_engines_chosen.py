"""Several engines in one compile, their locks, and the model repository for Triton."""

from __future__ import annotations

import json

import pytest

import derc
from derc import bundle, registry
from derc.bench import load_engine
from derc.errors import IntegrityError, MissingDependencyError, UsageError
from tests.conftest import KEPT, small_zoo

QUICK = {"evaluations": 2, "probe": 64, "profile_s": 2, "threads": 1, "latency_ms": 50.0}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(bundle, result) of a compile that may take either of two engines."""
    folder = tmp_path_factory.mktemp("both")
    zoo = small_zoo(folder, *KEPT)
    out = folder / "out"
    return out, derc.compile(str(zoo), "digits", engine="onnxruntime,openvino", emit="triton", out=out, **QUICK)


def engine_of(out):
    described = bundle.read(out)["target"]["engine"]
    return registry.open_engine(":".join(filter(None, (described["engine"], described.get("variant")))))


def test_one_of_the_engines_is_shipped_and_measured(both):
    out, result = both
    engine = engine_of(out)
    assert engine.name in ("onnxruntime", "openvino") and (out / f"engine{engine.suffix}").exists()
    assert result["status"] == "ok" and result["latency"]["measured_ms"] > 0
    session = load_engine(out, engine)
    assert session.time() > 0
    session.close()


def test_raw_samples_of_parts_and_network_are_kept(both):
    out, result = both
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    seconds = {line["name"]: line["seconds"] for line in lines}
    assert {"network", "anchor", *(f"donor {name}" for name in KEPT)} <= seconds.keys()
    assert len(seconds["network"]) == result["latency"]["samples"]


def test_the_manifest_says_how_good_predictions_were(both):
    out, result = both
    manifest = bundle.read(out)
    donor = manifest["selected"]["blocks"][0]["donor"]
    assert manifest["donors"][donor]["latency"]["provenance"] == "measured"
    assert set(manifest["prediction"]["error_quantiles"]) == {"q5", "q25", "q50", "q75", "q95"}
    assert result["target"]["engine"]["engine"] == engine_of(out).name


def test_triton_s_files_are_part_of_the_bundle(both):
    out, _ = both
    files = bundle.verify(out)["files"]
    assert "triton/derc/config.pbtxt" in files and any(name.startswith("triton/derc/1/model.") for name in files)
    assert 'name: "derc"' in (out / "triton/derc/config.pbtxt").read_text()
    (out / "triton/derc/config.pbtxt").write_bytes((out / "triton/derc/config.pbtxt").read_bytes() + b"\n")
    with pytest.raises(IntegrityError, match=r"triton/derc/config.pbtxt is not what derc wrote"):
        bundle.verify(out)


def test_an_engine_of_another_version_is_refused(compiled, tmp_path):
    """The lock of the shared bundle's engine names its runtime, device and bytes."""
    source = compiled[0]
    for name in ("engine.onnx", "engine.lock.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    engine = registry.open_engine("onnxruntime")
    load_engine(tmp_path, engine).close()
    lock = json.loads((tmp_path / "engine.lock.json").read_text())
    lock["engine"]["onnxruntime"] = "1.0.0"
    (tmp_path / "engine.lock.json").write_text(json.dumps(lock))
    with pytest.raises(MissingDependencyError, match=r"built for onnxruntime 1\.0\.0, and this machine has"):
        load_engine(tmp_path, engine)
    (tmp_path / "engine.lock.json").write_bytes((source / "engine.lock.json").read_bytes())
    data = bytearray((source / "engine.onnx").read_bytes())
    (tmp_path / "engine.onnx").write_bytes(data[:-100])
    with pytest.raises(IntegrityError, match="cut short"):
        load_engine(tmp_path, engine)
    data[len(data) // 2] ^= 1
    (tmp_path / "engine.onnx").write_bytes(data)
    with pytest.raises(IntegrityError, match="not what derc wrote"):
        load_engine(tmp_path, engine)
    (tmp_path / "engine.onnx").unlink()
    with pytest.raises(UsageError, match="has no engine yet: run derc build"):
        load_engine(tmp_path, engine)


def test_an_engine_that_is_not_here_is_said(tmp_path):
    zoo = small_zoo(tmp_path, *KEPT)
    with pytest.raises(MissingDependencyError, match="TensorRT"):
        derc.compile(str(zoo), "digits", engine="tensorrt", out=tmp_path / "o", **QUICK)
    assert not (tmp_path / "o").exists()
