"""A budget of a seed: every network that is compared there, trained and judged, each once for all budgets.

What an assembly has seen when it is judged, in training images: stage 1 none, stage 2 one pass without labels, stage 3
another pass with labels and frozen blocks, stage 4 `epochs` more in which everything trains. Baselines see as many:
where the assembly is matched and trained with frozen blocks, random stitches and the paper's network get two passes
with labels and frozen blocks, and a donor, a student and a network from scratch two epochs more of everything.
`donor_recalibrated` is the donor with batch norms estimated anew. Stage 4 and the donor are trained with three rates,
of which the validation images choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from torch import nn

from benchmarks.accuracy_choices import Choice, choose, kept, short
from benchmarks.accuracy_networks import (
    FROZEN,
    Lesson,
    Net,
    forms,
    judged,
    paper_net,
    random_net,
    recalibrated_net,
    stitched_net,
    teach,
)
from benchmarks.accuracy_world import Row, World
from derc.artifacts import Assembly, StitchedAssembly
from derc.rivals import place
from derc.training.teacher import teacher_of

ASSEMBLY = ("stage1", "stage2", "stage3", "stage4", "random1", "random3", "random4", "scratch")
PAPER = ("paper1", "paper2", "paper3", "paper4")
DONOR = ("donor1", "donor_recalibrated", "donor4", "distilled")


def answered(items: Mapping[str, Row]) -> Row:
    """What `derc finetune --against` keeps of the trained assembly and the tuned donor, by the validation images."""
    names = [name for name in ("stage4", "donor4") if name in items]
    right = [np.unpackbits(np.frombuffer(bytes.fromhex(items[name]["right"]), np.uint8)) > 0 for name in names]
    ranks = [(float(items[name]["validation"]), 0.0) for name in names]
    kept = names[place(ranks, [name == "donor4" for name in names], right)]
    return {"answer4": items[kept]["heldout"], "answer4_validation": items[kept]["validation"], "answer4_of": kept}


@dataclass(frozen=True)
class Round:
    """One seed's networks; each is kept in the work folder under seed, network and name."""

    world: World
    seed: int
    of_donor: ClassVar[tuple[str, ...]] = DONOR

    def row(self, budget: float) -> Row | None:
        """Everything that is known at a budget, None where no donor is fast enough."""
        choice = choose(self.world, self.seed, budget)
        if choice is None:
            return None
        found: Row = {"seed": self.seed, "budget_ms": budget, **choice.row}
        found["tail_intact"] = self.judge_donor(choice.row.get("tail") or choice.donor)["heldout"]
        costs: dict[str, Row] = {}
        items = dict(self.items(choice))
        for name, item in items.items():
            found |= {name: item["heldout"], f"{name}_validation": item["validation"]}
            costs[name] = {"seconds": item["seconds"], "images": item["images"]}
        return found | answered(items) | {"costs": costs}

    def donors(self) -> list[Row]:
        """The intact donors than which no faster one is better on the validation images, as they are and tuned."""
        found, best = list[Row](), -1.0
        for name, latency in sorted(self.world.table.donors.items(), key=lambda one: one[1].ms):
            item = self.judge_donor(name)
            if item["validation"] > best:
                best, row = item["validation"], {"seed": self.seed, "donor": name, "donor_ms": latency.ms}
                for state, one in (("donor1", item), ("donor4", self.tuned(name))):
                    row |= {state: one["heldout"], f"{state}_validation": one["validation"]}
                found.append(row)
        return found

    def items(self, choice: Choice) -> list[tuple[str, Row]]:
        """Every network of a choice that there is."""
        found = [(name, self.donor_item(name, choice)) for name in self.of_donor]
        if choice.assembly is not None:
            found += [(name, self.assembly_item(name, choice.assembly)) for name in ASSEMBLY]
        if choice.paper is not None:
            found += [(name, self.paper_item(name, choice.paper)) for name in PAPER]
        return found

    def donor_item(self, name: str, choice: Choice) -> Row:
        """The best intact donor as it is, recalibrated, tuned, or taught by the zoo's best donor too."""
        donor, epochs, lesson = choice.donor, self.world.size.epochs, None
        start = partial(self.begun, donor)
        match name:
            case "donor1":
                return self.judge_donor(donor)
            case "donor4":
                return self.tuned(donor)
            case "donor_recalibrated":
                start = partial(self.recalibrated, donor)
            case "donor3":
                lesson = Lesson("donor", 2, self.seed)
            case _:
                given = self.world.size.distilled_lr, "fixed"
                lesson = Lesson("distilled", epochs + 2, self.seed, self.teacher(choice.best), given)
        return self.item(f"{donor}-{name}", start, lesson)

    def teacher(self, donor: str) -> nn.Module:
        """A donor that others learn from."""
        classes = self.world.context(self.seed).data.classes
        return teacher_of(self.world.zoo[donor], classes or ())

    def recalibrated(self, donor: str) -> Net:
        return recalibrated_net(self.donor_net(donor), self.world.context(self.seed).data)

    def tuned(self, donor: str) -> Row:
        lesson = Lesson("donor", self.world.size.epochs + 2, self.seed)
        return self.item(f"{donor}-donor4", lambda: self.begun(donor), lesson)

    def begun(self, donor: str) -> Net:
        """A donor as its training begins."""
        return self.donor_net(donor)

    def judge_donor(self, donor: str) -> Row:
        return self.item(f"{donor}-donor1", lambda: self.donor_net(donor))

    def donor_net(self, donor: str) -> Net:
        return stitched_net(StitchedAssembly(self.whole(donor), (), ()), self.world.lowered)

    def whole(self, donor: str) -> Assembly:
        return Assembly(self.world.analysis.partition.blocks[donor])

    def assembly_item(self, name: str, assembly: Assembly) -> Row:
        """One state of an assembly, or of the same blocks with random stitches or weights."""
        world, epochs, key = self.world, self.world.size.epochs, short(assembly)
        match name:
            case "stage1" | "stage2":
                return self.item(f"{key}-{name}", lambda: self.stitched(assembly, name))
            case "stage3":
                return self.item(f"{key}-{name}", lambda: self.stitched(assembly, "stage2"), self.frozen())
            case "stage4":
                lesson = Lesson("assembly", epochs, self.seed)
                start = partial(self.stitched, assembly, "stage2")
                return self.item(f"{key}-{name}", lambda: self.loaded(start(), f"{key}-stage3"), lesson)
            case "random1":
                return self.item(f"{key}-{name}", lambda: random_net(assembly, world.lowered, self.seed))
            case "random3":
                lesson = self.frozen(2)
                return self.item(f"{key}-{name}", lambda: random_net(assembly, world.lowered, self.seed), lesson)
            case "random4":
                lesson = Lesson("random", epochs, self.seed)
                start = partial(random_net, assembly, world.lowered, self.seed)
                return self.item(f"{key}-{name}", lambda: self.loaded(start(), f"{key}-random3"), lesson)
            case _:
                lesson = Lesson("scratch", epochs + 2, self.seed)
                return self.item(f"{key}-{name}", lambda: random_net(assembly, world.fresh, self.seed), lesson)

    def paper_item(self, name: str, assembly: Assembly) -> Row:
        """The paper's network after as many training images as the assembly at the same stage."""
        key, before = short(assembly), {"paper3": "paper2", "paper4": "paper3"}.get(name)
        lessons = {
            "paper2": self.frozen(),
            "paper3": self.frozen(),
            "paper4": Lesson("paper", self.world.size.epochs, self.seed),
        }

        def start() -> Net:
            net = paper_net(assembly, self.world.lowered, self.world.fresh, self.seed)
            return net if before is None else self.loaded(net, f"{key}-{before}")

        return self.item(f"{key}-{name}", start, lessons.get(name))

    def frozen(self, epochs: int = 1) -> Lesson:
        return Lesson(FROZEN, epochs, self.seed, given=(self.world.size.frozen_lr, "train"))

    def stitched(self, assembly: Assembly, stage: str) -> Net:
        return stitched_net(kept(self.world, self.seed, stage, assembly), self.world.lowered)

    def loaded(self, net: Net, key: str) -> Net:
        """The network with the weights that an earlier training left."""
        self.world.work.load(f"{self.seed}-{key}", net.network)
        return net

    def item(self, key: str, start: Callable[[], Net], lesson: Lesson | None = None) -> Row:
        """A network from its start through its lesson, if any, and what it is worth; the best form on validation."""
        found = [self.form(key, start, one) for one in forms(lesson, self.world.size.grid)]
        return max(found, key=lambda row: float(row["validation"]))

    def form(self, key: str, start: Callable[[], Net], lesson: Lesson | None) -> Row:
        work, data, size = self.world.work, self.world.context(self.seed).data, self.world.size
        rate = f"@{lesson.given[0]:g}{lesson.given[1]}" if lesson and lesson.given else ""
        name = f"{self.seed}-{key}"

        def make() -> Row:
            net, cost = start(), {"images": 0, "seconds": 0.0, "kept": "as it was"}
            if lesson is not None:
                trained = teach(net, data, size.train, lesson)
                cost = {"images": trained.images, "seconds": trained.seconds, "kept": trained.kept}
                if key.endswith(("stage3", "random3", "paper2", "paper3")):
                    work.save(name, net.network)
            return {**cost, "rate": rate[1:], **judged(net.network, data.validation, data.heldout)}

        return work.row(name + rate, make)
