"""package: build the engine, hold module, ONNX and engine against each other, and measure what will be shipped."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from derc import enginelock
from derc.artifacts import Array, Emitted, Parity, Shipped, digest
from derc.emitted import realise
from derc.engine import PRECISIONS, Session
from derc.errors import ParityError, PrecisionError
from derc.judge import run_all
from derc.measure import Measurement, MeasureOptions, measure
from derc.pipeline import Context
from derc.printing import Printed
from derc.registry import open_engine

TOLERANCE = 1e-4
"""Allowed difference in float32, as a share of the largest output (at least 1)."""


@dataclass(frozen=True)
class Allowed:
    """What a number format may change: the norm of the difference over that of the outputs, and how many answers."""

    difference: float
    agreement: float
    engine: float
    """The difference of ONNX and engine, which round the same way, so that what is left is a wrong kernel."""


ALLOWED = {"fp16": Allowed(0.02, 0.95, 0.02), "bf16": Allowed(0.1, 0.9, 0.1), "int8": Allowed(0.3, 0.85, 0.1)}
"""By format. A value is rounded to 11 bits in fp16 and 8 in bf16 (by up to 0.0005 and 0.004 of itself, which grows with
the depth), in int8 to steps of 1/255 of the widest range, which is coarse for most values: the embedded donors all in
int8 differ by 0.01 to 0.17 and answer 95% of the images alike or more. What that costs in accuracy is known from the
score, which the engine itself was given; here a wrong kernel or a wrong range has to show."""
UNREFERENCED = ("bf16",)
"""Formats that ONNX Runtime does not compute on a processor: module and engine are compared alone."""
PAIRS = ("module_onnx", "onnx_engine", "module_engine")


@dataclass(frozen=True)
class Package:
    """Verifies on `images` probe images, on `more_images` where a block is in a lower precision.

    Measures for at most `limit_s` seconds, beside the ONNX model `anchor`.
    """

    images: int = 16
    more_images: int = 64
    limit_s: float = 20.0
    name: ClassVar[str] = "package"
    produces: ClassVar[type] = Shipped

    def inputs(self, context: Context) -> str:
        return digest(context.engine.describe(), context.data.probe.digest)

    def run(self, context: Context, emitted: Emitted, anchor: bytes) -> Shipped:
        model = emitted.onnx.tobytes()
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, f"engine{context.engine.suffix}")
            context.builder.build(model, built, "the network")
            session = context.engine.load(built)
            try:
                parity = self._parity(context, emitted, session)
                measured = self._measure(context, session, anchor)
                placement = session.placement()
            finally:
                session.close()
            engine = np.frombuffer(built.read_bytes(), dtype=np.uint8)
            text = enginelock.beside(built, context.engine.describe(), "+".join(emitted.precisions))
        timings = measured.timings
        return Shipped(
            engine,
            parity,
            timings["network"].latency(),
            timings["anchor"].latency(),
            measured.noise,
            placement,
            text,
            {name: np.array(timing.samples) for name, timing in timings.items()},
        )

    def _measure(self, context: Context, session: Session, anchor: bytes) -> Measurement:
        """The network and the anchor in the same rounds."""
        beside = context.builder.session(anchor, "the anchor")
        try:
            calls = {"network": session.time, "anchor": beside.time}
            options = MeasureOptions(limit_s=self.limit_s)
            return measure(calls, options, anchor="anchor", track=context.console.track)
        finally:
            beside.close()

    def _parity(self, context: Context, emitted: Emitted, built: Session) -> Parity:
        """Raises ParityError beyond the tolerance, PrecisionError where a lower precision gives NaN or infinity."""
        precision, model = coarsest((context.engine.precisions[0], *emitted.precisions)), emitted.onnx.tobytes()
        count = self.images if precision == "fp32" else self.more_images
        images = next(iter(context.data.probe.batches(count)))[0]
        alone, batch = set(emitted.precisions) & set(UNREFERENCED), context.target.batch
        plain = None if alone else plain_run(model, batch, images.numpy())
        parity = compare(outputs(realised(emitted), images), plain, run_all(built, images.numpy(), batch), precision)
        check(parity)
        return parity


def plain_run(model: bytes, batch: int, images: Array) -> Array:
    """What ONNX says of the `model` for `batch` images at a time: what ONNX Runtime answers without any optimisation.

    Raises MissingDependencyError where ONNX Runtime is absent.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model)
        session = open_engine("onnxruntime").load(path)
        try:
            return run_all(session, images, batch)
        finally:
            session.close()


def coarsest(precisions: tuple[str, ...]) -> str:
    """The last of `precisions` in the order of `PRECISIONS`."""
    return max(precisions, key=PRECISIONS.index)


def compare(module: Array, plain: Array | None, built: Array, precision: str) -> Parity:
    """The outputs (n, classes) of module, ONNX and engine held against each other, with what `precision` allows.

    Raises PrecisionError where a lower precision gives NaN or infinity.
    """
    measured = largest if precision == "fp32" else relative
    module_onnx, onnx_engine = (None, None) if plain is None else (measured(plain, module), measured(built, plain))
    module_engine = measured(built, module)
    if precision == "fp32":
        return Parity(module_onnx, onnx_engine, module_engine, TOLERANCE * max(1.0, float(np.abs(module).max())))
    forms = [form for form in (module, plain, built) if form is not None]
    if np.isfinite(module).all() and not all(np.isfinite(form).all() for form in forms):
        raise PrecisionError(f"the network gives NaN or infinity in {precision}: leave that precision out")
    answers = [form.argmax(1) for form in forms]
    return Parity(
        module_onnx,
        onnx_engine,
        module_engine,
        tolerance=ALLOWED[precision].difference,
        relative=True,
        agreement=min(float((a == b).mean()) for a in answers for b in answers),
        least_agreement=ALLOWED[precision].agreement,
        engine_tolerance=ALLOWED[precision].engine,
    )


def check(parity: Parity) -> None:
    """Raise ParityError where a difference is beyond the tolerance."""
    for name in PAIRS:
        difference, closer = getattr(parity, name), name == "onnx_engine" and parity.engine_tolerance is not None
        allowed = parity.engine_tolerance if closer else parity.tolerance
        if difference is not None and not difference <= allowed:
            raise ParityError(
                f"{name.replace('_', ' and ')} differ by {difference:.3g} on probe images, "
                f"over {allowed:.3g}: leave out the donor whose operators the runtime computes otherwise, "
                "or update the runtime"
            )
    if parity.agreement < parity.least_agreement:
        raise ParityError(
            f"two forms of the network answer {parity.agreement:.0%} of the probe images alike, under "
            f"{parity.least_agreement:.0%}: leave the lower precision out, or update the runtime"
        )


def realised(emitted: Emitted) -> nn.Module:
    """The module that model.py makes."""
    return realise(Printed(emitted.source, {n: torch.from_numpy(w.copy()) for n, w in emitted.weights.items()}))


@torch.no_grad()
def outputs(network: nn.Module, images: torch.Tensor) -> Array:
    found: Array = network(images).numpy()
    return found


def largest(a: Array, b: Array) -> float:
    """Largest absolute difference; NaN where either holds one."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def relative(a: Array, b: Array) -> float:
    """Norm of a − b over the norm of b; NaN where either holds one."""
    b = b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
