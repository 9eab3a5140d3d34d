"""Target files, the machine that they are matched with, and what a bad one is told."""

from __future__ import annotations

import re
import tomllib

import pytest

from derc import target as module
from derc.artifacts import digest
from derc.devices import Gpu, describe_machine
from derc.errors import MissingDependencyError, UsageError
from derc.target import RATES, SHIPPED, Target, found, read, user_folder

GPUS = {
    "t4": Gpu("Tesla T4", "7.5", 15.8),
    "l4": Gpu("NVIDIA L4", "8.9", 23.6),
    "a10": Gpu("NVIDIA A10", "8.6", 23.7),
    "a100": Gpu("NVIDIA A100-SXM4-40GB", "8.0", 42.4),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", "8.0", 85.1),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "9.0", 85.0),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", "9.0", 85.0),
    "h200": Gpu("NVIDIA H200", "9.0", 150.1),
    "l40s": Gpu("NVIDIA L40S", "8.9", 47.7),
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 25.4),
    "orin": Gpu("Orin", "8.7", 65.9),
    "orin-nx": Gpu("Orin", "8.7", 16.3),
    "orin-nano": Gpu("Orin", "8.7", 8.0),
}
"""Devices by target, as their drivers name them."""
OTHERS = (
    Gpu("NVIDIA A10G", "8.6", 23.7),
    Gpu("NVIDIA A2", "8.6", 15.7),
    Gpu("NVIDIA L40", "8.9", 47.7),
    Gpu("NVIDIA H100 NVL", "9.0", 99.9),
    Gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "9.0", 10.4, partitioned=True),
    Gpu("NVIDIA H100 80GB HBM3", "9.0", 85.0, partitioned=True),
    Gpu("NVIDIA GeForce RTX 4090 Laptop GPU", "8.9", 17.1),
    Gpu("NVIDIA GeForce RTX 4090 D", "8.9", 25.4),
)
FILE = """
name = "mine"
description = "a board"
kind = "gpu"
engine = "tensorrt"
match = { gpu = "Board", capability = "8.7", memory_gb = [6, 9] }
peak = { fp32 = 1.5, int8 = 20 }
memory = { bandwidth_gb_s = 60, size_gb = 8 }
launch = { overhead_us = 5 }
source = { peak = "its sheet", memory = "its sheet", launch = "measured" }
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.toml").write_text(FILE)
    return tmp_path


def test_every_shipped_target_recognises_its_device_and_no_other():
    shipped = {name: Target.load(name) for name in found(SHIPPED.parent / "nowhere")}
    assert set(shipped) == {"cpu", *GPUS}
    matched = {name: {other for other, gpu in GPUS.items() if one.device.matches(gpu)} for name, one in shipped.items()}
    assert matched == {"cpu": set()} | {name: {name} for name in GPUS} | {"a100": {"a100", "a100-80gb"}}
    assert not [(name, gpu) for name, one in shipped.items() for gpu in OTHERS if one.device.matches(gpu)]


@pytest.mark.parametrize("name", [path.stem for path in sorted(SHIPPED.glob("*.toml"))])
def test_figures_are_those_that_hardware_can_have(name):
    device = Target.load(name).device
    peaks = device.peaks
    assert set(peaks) <= set(RATES)
    if device.kind == "gpu":
        assert peaks["fp32"] <= peaks.get("tf32", peaks["fp32"]) <= peaks["fp16"] < peaks["int8"]
        assert peaks["int8"] / peaks["fp16"] == pytest.approx(4 if name == "rtx-4090" else 2, rel=0.02)
        assert 5 < 1e3 * peaks["fp32"] / device.bandwidth < 110, "operations a byte"
        assert device.memory_range[0] <= device.memory <= device.memory_range[1]
    for key in ("peak", "memory"):
        assert re.search(r"https://|assumed:", device.sources[key])


@pytest.mark.parametrize(("name", "figures"), [("a100", (312.0, 1555)), ("h200", (989.5, 4800)), ("t4", (65.0, 320))])
def test_figures_by_the_data_sheets(name, figures):
    device = Target.load(name).device
    assert (device.peaks["fp16"], device.bandwidth) == figures


def test_cpu_is_here_and_names_the_settings():
    target = Target.load("cpu", threads=2, batch=4)
    assert (target.name, target.engine, target.threads, target.batch, target.present) == (
        "cpu", "onnxruntime", 2, 4, True,
    )  # fmt: skip
    target.require()
    assert digest(target) == digest(Target.load("cpu", threads=2, batch=4)) != digest(Target.load("cpu"))


def test_an_absent_gpu_loads_and_says_what_is_here(monkeypatch):
    target = Target.load("a100")
    monkeypatch.setattr(module, "gpus", lambda: ())
    assert not target.present
    with pytest.raises(MissingDependencyError, match=r"A100.*no NVIDIA GPU.*--target cpu"):
        target.require()
    monkeypatch.setattr(module, "gpus", lambda: (GPUS["t4"], OTHERS[4]))
    with pytest.raises(MissingDependencyError, match=r"Tesla T4, NVIDIA H100 80GB HBM3 MIG 1g.10gb \(a MIG part\)"):
        target.require()
    monkeypatch.setattr(module, "gpus", lambda: (GPUS["t4"], GPUS["a100"]))
    assert target.present
    target.require()


def test_own_targets_from_a_folder_and_from_a_path(folder):
    by_name, by_path = Target.load("mine", folder=folder), Target.load(str(folder / "mine.toml"))
    assert by_name == by_path
    assert by_name.device.matches(Gpu("A Board", "8.7", 7.5))
    assert not by_name.device.matches(Gpu("A Board", "8.7", 16.0))
    assert not by_name.device.matches(Gpu("A Board", "8.6", 7.5))
    assert user_folder({"XDG_CONFIG_HOME": "/x"}).as_posix() == "/x/derc/targets"


def test_unknown_names_and_names_taken(folder):
    with pytest.raises(UsageError, match=r"unknown target 'a1000'.*did you mean 'a100'.*mine.toml"):
        Target.load("a1000", folder=folder)
    (folder / "a100.toml").write_text(FILE)
    with pytest.raises(UsageError, match=r"a100.toml has the name of a target that derc ships"):
        Target.load("mine", folder=folder)
    with pytest.raises(UsageError, match=r"other.toml cannot be read: No such file"):
        Target.load(str(folder / "other.toml"))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "mine"', 'name = "other"', "its name is 'other'.*'mine'"),
        ('kind = "gpu"', 'kind = "tpu"', "kind: input should be 'cpu' or 'gpu'"),
        ("fp32 = 1.5, ", "", "needs fp32"),
        ("fp32 = 1.5", "fp32 = -1.5", r"\[peak\] fp32: input should be greater than 0"),
        ("fp32 = 1.5", "fp32 = nan", r"\[peak\] fp32: input should be"),
        ("int8 = 20", "int4 = 20", r"\[peak\] int4 is an unknown precision"),
        ("int8 = 20", "int8 = 'fast'", r"\[peak\] int8: input should be a valid number"),
        ("bandwidth_gb_s = 60, ", "", r"\[memory\] bandwidth_gb_s: is missing"),
        ("bandwidth_gb_s = 60", "bandwidth = 60", r"\[memory\] bandwidth.*(missing|unknown key)"),
        ('gpu = "Board"', 'gpu = "Board("', r"\[match\] gpu: must be a regular expression"),
        ('gpu = "Board", ', "", r"\[match\] gpu, a pattern of its name, belongs to kind 'gpu'"),
        ("size_gb = 8", "l2_mb = 8", "source.*figures of l2"),
        ('launch = "measured"', 'lunch = "measured"', "source.*figures of launch"),
        ("launch = { overhead_us = 5 }", "launch = {", "is not valid TOML.*line"),
    ],
)
def test_a_bad_file_is_told_its_field_in_one_sentence(folder, old, new, says):
    path = folder / "mine.toml"
    assert old in FILE
    path.write_text(FILE.replace(old, new))
    with pytest.raises(UsageError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_shipped_files_are_what_they_are_read_as():
    tree = tomllib.loads((SHIPPED / "l40s.toml").read_text())
    device = Target.load("l40s").device
    assert dict(device.peaks) == tree["peak"]
    assert (device.bandwidth, device.memory, device.l2) == (864, 48, 96)


def test_the_machine_is_described_as_far_as_it_can_be_read(tmp_path):
    for path, text in (
        ("proc/cpuinfo", "processor : 0\nmodel name\t: A Processor\n"),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n"),
        ("sys/fs/cgroup/cpu.max", "150000 100000\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = describe_machine(tmp_path, gpu=True)
    assert (found["cpu"], found["governor"], found["quota"]) == ("A Processor", "powersave", "150000 100000")
    assert "no_turbo" not in found and all(found.values())
