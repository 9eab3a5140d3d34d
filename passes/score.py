"""score: what stitched candidates are worth, without training: accuracy or agreement, and NASWOT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from derc import deployed
from derc.artifacts import Consensus, Scores, StitchedAssembly, digest
from derc.assembled import assemble
from derc.data import Split
from derc.errors import PrecisionError
from derc.judge import answers, columns_of, consensus, correct, logits, run_logits
from derc.pipeline import Context

ACTIVATIONS = {
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.gelu.default,
    torch.ops.aten.silu.default,
    torch.ops.aten.silu_.default,
    torch.ops.aten.hardswish.default,
    torch.ops.aten.hardswish_.default,
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.clamp.default,
}


@dataclass(frozen=True)
class Consult:
    """What the task donors' mean prediction answers on the validation images; nothing where those have labels."""

    name: ClassVar[str] = "consult"
    produces: ClassVar[type] = Consensus

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors], context.data.digest())

    def run(self, context: Context) -> Consensus:
        if context.data.validation.labels is not None:
            return Consensus(np.zeros(0, dtype=np.int64))
        donors = [context.lowered[name] for name in context.data.task_donors(context.zoo)]
        return Consensus(consensus(donors, context.data.validation))


@dataclass(frozen=True)
class Score:
    """Scores a stitched assembly on the validation images: against labels, else against the consensus.

    What the engine computes in float32 is scored as the module in memory, anything else by the engine itself, as it
    will be shipped. Raises what building such an engine raises.
    """

    naswot_images: int = 96
    naswot_batch: int = 32
    name: ClassVar[str] = "score"
    produces: ClassVar[type] = Scores

    def inputs(self, context: Context) -> str:
        donors = [donor.digest() for donor in context.zoo.donors]
        return digest(donors, context.data.digest(), deployed.engine_key(context))

    def run(self, context: Context, stitched: StitchedAssembly, reference: Consensus) -> Scores:
        network = assemble(stitched.assembly, context.lowered, stitched.states)
        split = context.data.validation
        if deployed.differs(context, stitched.assembly):
            outputs = self._deployed(context, stitched)
        else:
            outputs = logits(network, split)
        columns = columns_of(context.zoo[stitched.assembly.blocks[-1].donor].labels, context.data)
        right = correct(outputs, split, columns)
        labelled = right is not None
        if right is None:
            right = answers(outputs, None) == reference.answers
        return Scores(naswot(network, context.data.probe, self.naswot_images, self.naswot_batch), labelled, right)

    def _deployed(self, context: Context, stitched: StitchedAssembly) -> torch.Tensor:
        """Outputs of the engine on the validation images. Raises PrecisionError where they are not finite."""
        session = context.builder.session(deployed.model_of(context, stitched), str(stitched.assembly))
        try:
            outputs = run_logits(session, context.data.validation, context.target.batch)
        finally:
            session.close()
        if not torch.isfinite(outputs).all():
            raise PrecisionError(
                f"{stitched.assembly} gives NaN or infinity on validation images: use a wider precision"
            )
        return outputs


class Codes(TorchDispatchMode):
    """Collects, for each activation function that runs, which of its inputs are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in ACTIVATIONS and args[0].dim() > 1:
            self.codes.append((args[0] > 0).flatten(1))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def naswot(network: nn.Module, probe: Split, images: int, batch: int) -> float:
    """Mean of log|K_H| over batches, K_H the Hamming kernel of activation codes (Mellor et al. 2021, eq. 2)."""
    values = []
    for number, (x, _) in enumerate(probe.batches(batch)):
        if number * batch >= images or len(x) < batch:
            break
        with Codes() as seen:
            network(x)
        values.append(log_determinant([code for code in seen.codes if len(code) == len(x)]))
    return float(np.mean(values)) if values else 0.0


def log_determinant(codes: list[torch.Tensor]) -> float:
    """log|K| of K = Σ c cᵀ + (1 - c)(1 - c)ᵀ over binary codes (n, units); 0 without codes."""
    if not codes:
        return 0.0
    kernel = torch.zeros(len(codes[0]), len(codes[0]), dtype=torch.float64)
    for code in codes:
        c = code.float()
        kernel += (c @ c.T + (1 - c) @ (1 - c).T).double()
    return float(torch.linalg.slogdet(kernel)[1])
