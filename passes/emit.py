"""emit: an assembly as plain PyTorch source, weights and ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from derc import deployed
from derc.artifacts import Emitted, StitchedAssembly, digest
from derc.assembled import live
from derc.emitted import realise
from derc.errors import ParityError
from derc.exporting import export
from derc.parts import entry
from derc.pipeline import Context
from derc.printing import print_network


@dataclass(frozen=True)
class Emit:
    """Prints the network, runs what it printed against the assembly in memory, and exports it to ONNX.

    The module is float32 always; in ONNX each block has its own precision.
    """

    images: int = 16
    name: ClassVar[str] = "emit"
    produces: ClassVar[type] = Emitted

    def inputs(self, context: Context) -> str:
        used = [donor.digest() for donor in context.zoo.donors]
        return digest(used, context.target.batch, context.data.probe.digest, deployed.engine_key(context))

    def run(self, context: Context, stitched: StitchedAssembly) -> Emitted:
        states = [{k: torch.from_numpy(v) for k, v in state.items()} for state in stitched.states]
        donors = {donor.name: donor for donor in context.zoo.donors}
        printed = print_network(stitched.assembly, donors, context.lowered, states, stitched.head, stitched.buffers)
        network = realise(printed)
        reference = live(stitched, context.lowered)
        parity = self._difference(network, reference, context)
        if parity != 0.0:
            raise ParityError(
                f"the emitted model.py differs from the assembled network by {parity:.3g} on probe images: "
                "a donor's forward pass does more than its graph shows; leave that donor out and report it"
            )
        weights = {name: value.detach().contiguous().numpy() for name, value in printed.weights.items()}
        model = np.frombuffer(self._model(context, stitched, network), dtype=np.uint8)
        return Emitted(printed.source, weights, model, parity, stitched.assembly.precisions)

    def _model(self, context: Context, stitched: StitchedAssembly, network: nn.Module) -> bytes:
        if stitched.assembly.plain is not stitched.assembly:
            return deployed.model_of(context, stitched)
        example = torch.zeros(context.target.batch, *entry(stitched.assembly, context.lowered).shape)
        return export(network, example, ("output",))

    @torch.no_grad()
    def _difference(self, network: nn.Module, reference: nn.Module, context: Context) -> float:
        images, _ = next(iter(context.data.probe.batches(self.images)))
        return float((network(images.clone()) - reference(images.clone())).abs().max())
