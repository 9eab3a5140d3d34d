"""AOTInductor: what a package holds and is for, and that a build leaves nothing behind; the rest is in the contract."""

from __future__ import annotations

import json
import zipfile

import psutil
import pytest
import torch
from onnx import helper
from torch._inductor import config as inductor_config

from derc.backends.inductor import CudaSession, Inductor
from derc.errors import DercError, IntegrityError, MissingDependencyError
from tests.backends import contract
from tests.backends.contract import IMAGES, network, oracle, sqnr
from tests.onnxdonor.models import model as handmade


@pytest.fixture(scope="module")
def engine():
    try:
        return Inductor(threads=1)
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def package(engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("inductor") / "engine.pt2"
    path.write_bytes(contract.package("inductor"))
    return path


def test_threads_of_the_caller_stay(engine, package):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        session = engine.load(package)
        session.run(IMAGES)
        session.time()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_building_leaves_no_process(engine, tmp_path):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    engine.build(contract.exported(), tmp_path / "engine.pt2")
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_loaded_package_leaves_no_folder_behind(engine, package, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    session = engine.load(package)
    package_is_unpacked = list(tmp_path.iterdir())
    session.close()
    assert list(tmp_path.iterdir()) == [], package_is_unpacked


def test_a_package_holds_its_own_weights(engine, package, tmp_path):
    moved = tmp_path / "elsewhere.pt2"
    moved.write_bytes(package.read_bytes())
    assert sqnr(oracle(IMAGES), engine.load(moved).run(IMAGES)) > 100
    weights = sum(4 * value.numel() for value in network().parameters())
    with zipfile.ZipFile(package) as archive:
        (library,) = [part for part in archive.infolist() if part.filename.endswith(".so")]
        assert library.file_size > weights


@pytest.mark.parametrize(("what", "other"), [("torch", "1.0"), ("device", "Another CPU"), ("threads", "64")])
def test_a_package_for_something_else_is_refused(engine, package, tmp_path, what, other):
    path = tmp_path / "engine.pt2"
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for part in old.infolist():
            data = old.read(part)
            if part.filename.endswith("wrapper_metadata.json"):
                whole = json.loads(data)
                whole["derc"] = json.dumps(json.loads(whole["derc"]) | {what: other})
                data = json.dumps(whole).encode()
            new.writestr(part, data)
    with pytest.raises(IntegrityError, match=f"is for {what} {other}, not .*: build it again"):
        engine.load(path)


def test_a_zip_with_other_parts_is_refused(engine, tmp_path):
    with zipfile.ZipFile(tmp_path / "engine.pt2", "w") as archive:
        archive.writestr("model.xml", "<net/>")
    with pytest.raises(IntegrityError, match=r"holds 0 parts \*wrapper_metadata\.json"):
        engine.load(tmp_path / "engine.pt2")


def test_an_operator_that_the_importer_lacks_is_named(engine):
    proto = handmade([helper.make_node("Nope", ["x"], ["y"], domain="odd")], shape=(1, 4, 6, 6), domains={"odd": 1})
    with pytest.raises(DercError, match="odd::Nope"):
        engine.open(proto.SerializeToString())


def test_without_a_compiler_the_remedy_is_named():
    absent = inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
    with absent, pytest.raises(MissingDependencyError, match=r"finds none: install g\+\+"):
        Inductor()


@pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is here")
def test_without_a_gpu_cuda_is_refused():
    with pytest.raises(MissingDependencyError, match="finds no NVIDIA GPU for inductor:cuda"):
        Inductor(variant="cuda")


def test_kernels_left_on_the_cpu_are_no_gpu_engine():
    with pytest.raises(DercError, match="left kernels of this model on the CPU"):
        CudaSession(lambda inputs: inputs, (1, 3), 1, {"cpu": 1, "cuda": 7})
