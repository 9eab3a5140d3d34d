"""An assembly as a live network: donors' blocks, and what derc adds, in a row."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from derc import lastlayer, stitching
from derc.artifacts import Array, Assembly, BlockRef, FittedHead, StitchedAssembly
from derc.lowered import Lowered
from derc.modules import Stitch
from derc.parts import parts


class Assembled(nn.Module):
    """`parts` are donors' blocks, which share the donors' parameters, and what derc adds: stitches, stem, head."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x

    @property
    def stitches(self) -> list[Stitch]:
        return [part for part in self.parts if isinstance(part, Stitch)]


def live(stitched: StitchedAssembly, lowered: Mapping[str, Lowered]) -> Assembled:
    """The network of a stitched assembly in eval mode, with everything that it has in place of its donors'."""
    return assemble(stitched.assembly, lowered, stitched.states, stitched.head, stitched.buffers)


def assemble(
    assembly: Assembly,
    lowered: Mapping[str, Lowered],
    states: tuple[dict[str, Array], ...] = (),
    head: FittedHead | None = None,
    buffers: tuple[dict[str, Array], ...] = (),
) -> Assembled:
    """The network of an assembly in eval mode; what has no state keeps torch's random initialisation.

    A fitted `head` takes the place of the last block's own, which stays as it is in the donor. A block that has
    `buffers` is a copy; any other shares its donor's parameters.
    """
    modules: list[nn.Module] = []
    remaining, others = list(states), list(buffers)
    for part in parts(assembly, lowered):
        if isinstance(part.spec, BlockRef):
            block = lowered[part.spec.donor].block(part.spec.first, part.spec.last)
            modules.append(with_buffers(block, others.pop(0) if others else {}))
            continue
        module = part.build()
        if remaining:
            module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in remaining.pop(0).items()})
        modules.append(module)
    if head is not None:
        lastlayer.replace(modules[-1], head)
    return Assembled(modules).eval()


def with_buffers(block: nn.Module, buffers: Mapping[str, Array]) -> nn.Module:
    """The block itself, or a copy that has `buffers`, by path, in place of its own; every path must exist."""
    if not buffers:
        return block
    block = copy.deepcopy(block)
    block.load_state_dict({**block.state_dict(), **{k: torch.from_numpy(v.copy()) for k, v in buffers.items()}})
    return block


def new_stitch(assembly: Assembly, index: int, lowered: Mapping[str, Lowered]) -> Stitch:
    """A fresh linear stitch in front of block `index`."""
    before, after = assembly.blocks[index - 1], assembly.blocks[index]
    source, target = lowered[before.donor].cuts[before.last].type, lowered[after.donor].cuts[after.first].type
    joint = assembly.joint(index)
    return stitching.build(source, target, joint.form if joint else stitching.PLAIN)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random state set by `seed` inside, restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
