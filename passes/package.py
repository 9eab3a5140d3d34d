"""package: build the engine, hold module, ONNX and engine against each other, and measure what will be shipped."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from derc.artifacts import Array, Emitted, Latency, Parity, Shipped, digest
from derc.emitted import realise
from derc.engine import Session
from derc.errors import ParityError
from derc.measure import MeasureOptions, measure
from derc.pipeline import Context
from derc.printing import Printed

TOLERANCE = 1e-4
"""Allowed difference in float32, as a share of the largest output (at least 1)."""


@dataclass(frozen=True)
class Package:
    """Verifies on `images` probe images; measures for at most `limit_s` seconds, beside the ONNX model `anchor`."""

    images: int = 16
    limit_s: float = 20.0
    name: ClassVar[str] = "package"
    produces: ClassVar[type] = Shipped

    def inputs(self, context: Context) -> str:
        return digest(context.engine.describe(), context.data.probe.digest)

    def run(self, context: Context, emitted: Emitted, anchor: bytes) -> Shipped:
        model = emitted.onnx.tobytes()
        with tempfile.TemporaryDirectory() as folder:
            plain, built = Path(folder, "model.onnx"), Path(folder, f"engine{context.engine.suffix}")
            plain.write_bytes(model)
            context.engine.build(model, built)
            session = context.engine.load(built)
            reference = context.engine.load(plain)
            try:
                parity = self._parity(context, emitted, reference, session)
                reference.close()
                latency, beside, noise = self._measure(context, session, anchor)
                placement = session.placement()
            finally:
                session.close()
                reference.close()
            engine = np.frombuffer(built.read_bytes(), dtype=np.uint8)
        return Shipped(engine, parity, latency, beside, noise, placement)

    def _measure(self, context: Context, session: Session, anchor: bytes) -> tuple[Latency, Latency, float]:
        """Latencies of the network and of the anchor in the same rounds, and the A/A noise."""
        beside = context.engine.open(anchor)
        try:
            calls = {"network": session.time, "anchor": beside.time}
            options = MeasureOptions(limit_s=self.limit_s)
            measured = measure(calls, options, anchor="anchor", track=context.console.track)
        finally:
            beside.close()
        return measured.timings["network"].latency(), measured.timings["anchor"].latency(), measured.noise

    def _parity(self, context: Context, emitted: Emitted, plain: Session, built: Session) -> Parity:
        """Raises ParityError beyond the tolerance."""
        images = next(iter(context.data.probe.batches(self.images)))[0]
        network = realise(Printed(emitted.source, {n: torch.from_numpy(w.copy()) for n, w in emitted.weights.items()}))
        want = outputs(network, images)
        runs = [batched(session, images.numpy(), context.target.batch) for session in (plain, built)]
        tolerance = TOLERANCE * max(1.0, float(np.abs(want).max()))
        parity = Parity(largest(want, runs[0]), largest(runs[0], runs[1]), largest(want, runs[1]), tolerance)
        for name in ("module_onnx", "onnx_engine", "module_engine"):
            difference = getattr(parity, name)
            if not difference <= tolerance:
                raise ParityError(
                    f"{name.replace('_', ' and ')} differ by {difference:.3g} on probe images, over {tolerance:.3g}: "
                    "leave out the donor whose operators the runtime computes otherwise, or update the runtime"
                )
        return parity


@torch.no_grad()
def outputs(network: nn.Module, images: torch.Tensor) -> Array:
    found: Array = network(images).numpy()
    return found


def batched(session: Session, images: Array, batch: int) -> Array:
    """Outputs for any number of images, the last batch filled up with repeats."""
    rows = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        rows.append(session.run(filled)[: len(part)])
    return np.concatenate(rows)


def largest(a: Array, b: Array) -> float:
    """Largest absolute difference; NaN where either holds one."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
