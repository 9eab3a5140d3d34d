"""score: what stitched candidates are worth, without training: accuracy or agreement, NASWOT, and the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from derc import deployed, scoring
from derc.artifacts import Consensus, Scores, StitchedAssembly, digest
from derc.assembled import live
from derc.data import Split
from derc.errors import PrecisionError
from derc.judge import beliefs, columns_of, consensus, logits, run_logits
from derc.pipeline import Context
from derc.scoring.codes import naswot
from derc.scoring.evidence import ANSWERS, BELIEFS, Proxy, Subject, gather


@dataclass(frozen=True)
class Consult:
    """What the task donors' mean prediction answers on the validation images; nothing where those have labels.

    And what it says of the probe images, where the objective needs it.
    """

    name: ClassVar[str] = "consult"
    produces: ClassVar[type] = Consensus

    def inputs(self, context: Context) -> str:
        asked = asks(scoring.open_proxy(context.objective), context)
        return digest([donor.digest() for donor in context.zoo.donors], context.data.digest(), asked)

    def run(self, context: Context) -> Consensus:
        data = context.data
        names = data.task_donors(context.zoo)
        labelled = data.validation.labels is not None
        donors = [(context.lowered[n], columns_of(context.zoo[n].labels, data) if labelled else None) for n in names]
        found = np.zeros(0, dtype=np.int64) if labelled else consensus([one for one, _ in donors], data.validation)
        if not asks(scoring.open_proxy(context.objective), context):
            return Consensus(found)
        return Consensus(found, beliefs(donors, data.probe))


def asks(proxy: Proxy, context: Context) -> bool:
    """Whether the proxy needs the donors' predictions on the probe images, as such or in place of labels."""
    return BELIEFS in proxy.needs or (ANSWERS in proxy.needs and context.data.validation.labels is None)


@dataclass(frozen=True)
class Score:
    """Scores a stitched assembly: against labels, else against the consensus, and by the context's objective.

    What the engine computes in float32 is scored as the module in memory, anything else by the engine itself, as it
    will be shipped; proxies that need the module see it in float32. Raises what building such an engine raises.
    """

    naswot_images: int = 96
    naswot_batch: int = 32
    name: ClassVar[str] = "score"
    produces: ClassVar[type] = Scores

    def inputs(self, context: Context) -> str:
        donors = [donor.digest() for donor in context.zoo.donors]
        code = scoring.version(type(scoring.open_proxy(context.objective)))
        return digest(donors, context.data.digest(), deployed.engine_key(context), context.objective, code)

    def run(self, context: Context, stitched: StitchedAssembly, reference: Consensus) -> Scores:
        network = live(stitched, context.lowered)
        deploys = deployed.differs(context, stitched.assembly)
        subject = Subject(network, partial(self._deployed, context, stitched) if deploys else partial(logits, network))
        evidence = gather(context.data, context.zoo[stitched.assembly.blocks[-1].donor].labels, reference)
        answers = evidence.picked(subject.outputs(evidence.validation)).argmax(1).numpy()
        right = answers == evidence.validation_answers
        codes = naswot(network, context.data.probe, self.naswot_images, self.naswot_batch)
        if context.objective == "accuracy":
            return Scores(codes, evidence.labelled, right)
        proxy = scoring.open_proxy(context.objective)
        estimate = proxy.measure(subject, evidence)
        # A network that computes no number is as good as nothing.
        share = 0.0 if math.isnan(estimate) else proxy.share(estimate)
        return Scores(codes, evidence.labelled, right, context.objective, estimate, share)

    def _deployed(self, context: Context, stitched: StitchedAssembly, split: Split) -> torch.Tensor:
        """Outputs of the engine on a split. Raises PrecisionError where they are not finite."""
        session = context.builder.session(deployed.model_of(context, stitched), str(stitched.assembly))
        try:
            outputs = run_logits(session, split, context.target.batch)
        finally:
            session.close()
        if not torch.isfinite(outputs).all():
            raise PrecisionError(
                f"{stitched.assembly} gives NaN or infinity on validation images: use a wider precision"
            )
        return outputs
