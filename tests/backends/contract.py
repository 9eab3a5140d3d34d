"""What every engine promises, tested on each that this machine can load; `pytest -rs` lists the others, and why."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from derc.engine import Engine, parse, random_input
from derc.errors import DercError, IntegrityError, MissingDependencyError, UsageError
from derc.exporting import export
from derc.registry import ENGINES, open_engine

SHAPE = (2, 3, 48, 48)
VARIANTS = ("onnxruntime:cuda", "onnxruntime:tensorrt", "onnxruntime:openvino", "openvino:bf16", "inductor:cuda")
SPECS = (*ENGINES, *VARIANTS)
NO_CHECKSUM = {
    "onnxruntime": "an ONNX file holds no checksum of its weights: the bundle's manifest finds a flipped bit",
    "tensorrt": "a plan holds no checksum: its lock finds a flipped bit",
}
OPERATORS = 13
"""Of the network below, in ONNX; each rounds its result, and its weights were rounded before."""
BITS = {"fp32": 24, "fp16": 11, "bf16": 8}
"""Of the significand."""
TERMS = 32 * 3 * 3
"""Products that the widest convolution adds up; float32 rounds every sum, and the other formats add in float32."""
PEAK = 12
"""Range of a tensor over its root mean square, at which int8 still has to be as good as `least_sqnr` says."""


class Network(nn.Module):
    """What blocks are made of: convolutions, batch-norm, a residual, depthwise, an average and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.mix, self.norm = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, stride=2, groups=32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.mix(x)))
        return self.head(nn.functional.gelu(self.deep(x)).mean((2, 3)))


def network() -> Network:
    torch.manual_seed(0)
    made = Network().eval()
    made.norm.running_mean.uniform_(-0.2, 0.2)
    made.norm.running_var.uniform_(0.5, 1.5)
    return made


def oracle(images: np.ndarray) -> np.ndarray:
    """The network in float64, by torch."""
    with torch.no_grad():
        return network().double()(torch.from_numpy(images).double()).numpy()


def sqnr(want: np.ndarray, got: np.ndarray) -> float:
    """Signal over noise in dB."""
    noise = float(np.square(want - got.astype(np.float64)).sum())
    return 10 * math.log10(float(np.square(want).sum()) / noise) if noise else math.inf


def least_sqnr(precision: str) -> float:
    """What rounding the results and weights of all operators costs at most, if the errors do not conspire.

    A float of p bits is off by 2⁻ᵖ of itself at most, evenly spread: 4⁻ᵖ / 3. A step of int8 is 1/255 of the range.
    """
    one = (PEAK / 255) ** 2 / 12 if precision == "int8" else 4.0 ** -BITS[precision] / 3
    return -10 * math.log10(2 * OPERATORS * one * (TERMS if precision == "fp32" else 1))


@dataclass(frozen=True)
class Built:
    """An engine with one thread, a model, and what the engine built of it."""

    spec: str
    engine: Engine
    model: bytes
    path: Path


@cache
def missing(spec: str) -> str:
    """Why this machine cannot load the engine; empty where it can."""
    try:
        open_engine(spec, threads=1)
    except MissingDependencyError as error:
        return f"engine {spec}: {error}"
    return ""


@cache
def exported() -> bytes:
    return export(network(), torch.zeros(SHAPE), ["logits"])


@cache
def package(spec: str) -> bytes:
    """What the engine with one thread builds of the network; it leaves nothing else in the folder."""
    made = open_engine(spec, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"engine{made.suffix}")
        made.build(exported(), path)
        assert list(path.parent.iterdir()) == [path]
        return path.read_bytes()


@pytest.fixture(scope="module")
def built(request, tmp_path_factory) -> Built:
    made = open_engine(request.param, threads=1)
    path = tmp_path_factory.mktemp("engine") / f"engine{made.suffix}"
    path.write_bytes(package(request.param))
    return Built(request.param, made, exported(), path)


@pytest.fixture(scope="module")
def session(built):
    opened = built.engine.load(built.path)
    yield opened
    opened.close()


IMAGES = random_input(SHAPE, seed=1)


class Contract:
    """One engine after another: build once, then everything that a caller relies on."""

    def test_the_network_is_as_said(self):
        nodes = [
            node for node in onnx.load_from_string(exported()).graph.node if node.op_type not in ("Constant", "Reshape")
        ]
        assert len(nodes) <= OPERATORS

    def test_numbers(self, built, session):
        own = built.engine.precisions[0]
        got = session.run(IMAGES)
        assert got.shape == (2, 10) and got.dtype == np.float32
        assert sqnr(oracle(IMAGES), got) >= least_sqnr(own)

    def test_run_takes_other_layouts_in_memory(self, session):
        strided = np.asfortranarray(IMAGES)
        np.testing.assert_array_equal(session.run(strided), session.run(IMAGES))

    def test_runs_do_not_share_memory(self, session):
        first = session.run(IMAGES)
        kept = first.copy()
        other = session.run(-IMAGES)
        session.time()
        np.testing.assert_array_equal(first, kept)
        assert not np.array_equal(other, first)

    def test_what_is_opened_is_what_was_built(self, built, session):
        opened = built.engine.open(built.model)
        np.testing.assert_array_equal(opened.run(IMAGES), session.run(IMAGES))
        opened.close()

    def test_another_process_gives_the_same_numbers(self, built, session, tmp_path):
        np.save(tmp_path / "images.npy", IMAGES)
        code = (
            "import sys, pathlib, numpy as np\nfrom derc.registry import open_engine\n"
            "spec, path, folder = sys.argv[1], *map(pathlib.Path, sys.argv[2:])\n"
            "found = open_engine(spec, threads=1).load(path).run(np.load(folder / 'images.npy'))\n"
            "np.save(folder / 'found.npy', found)"
        )
        arguments = [sys.executable, "-c", code, built.spec, str(built.path), str(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
        np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), session.run(IMAGES))

    @pytest.mark.parametrize("cut", [0, 0.5], ids=["no model", "half a model"])
    def test_a_failed_build_leaves_what_was_there(self, built, tmp_path, cut):
        path = tmp_path / built.path.name
        path.write_bytes(b"what was there")
        with pytest.raises(DercError) as caught:
            built.engine.build(built.model[: int(cut * len(built.model))] or b"no model", path)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == b"what was there" and list(tmp_path.iterdir()) == [path]

    def test_a_bad_model_is_not_opened(self, built):
        with pytest.raises(DercError) as caught:
            built.engine.open(b"no model")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "empty", "flipped bit"])
    def test_a_damaged_engine_is_refused(self, built, tmp_path, damage):
        path, good = tmp_path / built.path.name, bytearray(built.path.read_bytes())
        if damage == "flipped bit":
            if (reason := NO_CHECKSUM.get(parse(built.spec)[0])) is not None:
                pytest.skip(f"engine {built.spec}: {reason}")
            good[len(good) // 2] ^= 1
        kinds = {"truncated": good[: len(good) // 2], "garbage": b"\x00\xff" * 5000, "empty": b"", "flipped bit": good}
        if damage in kinds:
            path.write_bytes(kinds[damage])
        with pytest.raises(IntegrityError) as caught:
            built.engine.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    def test_a_wrong_shape_is_refused(self, session):
        with pytest.raises(UsageError, match=r"\(2, 3, 48, 48\), not \(1, 3, 48, 48\)"):
            session.run(IMAGES[:1])

    def test_time_is_that_of_a_run(self, session):
        def run() -> float:
            start = time.perf_counter()
            session.run(IMAGES)
            return time.perf_counter() - start

        alone, whole = min(session.time() for _ in range(30)), min(run() for _ in range(30))
        assert 0 < alone < 2 * whole and whole < 5 * alone + 1e-3

    def test_placement(self, session):
        places = session.placement()
        assert len(places) == 1 and 0 < sum(places.values()) <= 3 * OPERATORS
        assert session.placement() == places

    def test_describe(self, built):
        told = built.engine.describe()
        name, variant = parse(built.spec)
        assert all(isinstance(value, str) and value and "\n" not in value for value in told.values())
        assert told["engine"] == name and told.get("variant", "") == variant == built.engine.variant
        assert told["threads"] == "1" and told["device"]
        assert told == open_engine(built.spec, threads=1).describe() != open_engine(built.spec, threads=2).describe()
        assert open_engine(built.spec, threads=0).threads >= 1

    def test_threads_are_those_asked_for(self, built, session):
        """The calling thread's own share of the CPU time: all of it with one thread, less with two.

        How much less depends on what else keeps the cores busy: from a half to a hundredth.
        """
        opened = open_engine(built.spec, threads=2).open(built.model)
        assert max(_own_share(session) for _ in range(4)) > 0.999
        assert min(_own_share(opened) for _ in range(8)) < 0.995
        opened.close()

    def test_negative_threads_are_refused(self, built):
        with pytest.raises(UsageError, match="-1"):
            open_engine(built.spec, threads=-1)

    def test_unknown_variants_are_refused(self, built):
        with pytest.raises(UsageError, match="nothing_like_it"):
            open_engine(f"{parse(built.spec)[0]}:nothing_like_it")

    def test_a_closed_session_says_so(self, built):
        opened = built.engine.load(built.path)
        opened.run(IMAGES)
        opened.close()
        opened.close()
        for use in (lambda: opened.run(IMAGES), opened.time, opened.placement):
            with pytest.raises(DercError, match="closed"):
                use()

    def test_precisions(self, built, session):
        """Each keeps the float32 interface, gives equal bytes again, and differs from float32 as its format does."""
        engine, own = built.engine, built.engine.precisions[0]
        samples = [random_input(SHAPE, seed) for seed in range(2, 10)]
        assert engine.rewrite(built.model, own, samples) == built.model
        for precision in engine.precisions[1:]:
            rewritten = engine.rewrite(built.model, precision, samples)
            assert rewritten == engine.rewrite(built.model, precision, samples) != built.model
            graph = onnx.load_from_string(rewritten).graph
            for value, shape in ((graph.input[0], SHAPE), (graph.output[0], (2, 10))):
                kind = value.type.tensor_type
                assert kind.elem_type == onnx.TensorProto.FLOAT
                assert tuple(dim.dim_value for dim in kind.shape.dim) == shape
            opened = engine.open(rewritten)
            assert least_sqnr(precision) <= sqnr(oracle(IMAGES), opened.run(IMAGES)) < least_sqnr("fp32")
            assert len(opened.placement()) == 1
            opened.close()

    def test_an_unknown_precision_is_refused(self, built):
        with pytest.raises(UsageError, match="int3"):
            built.engine.rewrite(built.model, "int3", [IMAGES])


def _own_share(session) -> float:
    """CPU time of the calling thread over that of all threads, over many runs.

    Threads of earlier tests that come to rest make it smaller now and then.
    """
    for _ in range(5):
        session.time()
    whole, own, start = time.process_time(), time.thread_time(), time.perf_counter()
    while time.perf_counter() - start < 0.3:
        session.time()
    return (time.thread_time() - own) / (time.process_time() - whole)
