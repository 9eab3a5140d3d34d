"""A traced network with its graph, cuts and units, and the blocks between any two cuts as trainable modules."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from derc import uncut
from derc.artifacts import CutDonor, Unit
from derc.errors import UsageError
from derc.ir import Graph, Value
from derc.mode import in_eval


@dataclass(frozen=True)
class Call:
    """One call of a submodule during tracing: `path(argument) -> result`, both names of values."""

    path: str
    argument: str
    result: str
    members: frozenset[str]
    """Every value that the call defines."""


@dataclass(frozen=True)
class Lowered:
    """A network as a typed graph over its own, live submodules.

    `program` shares parameters and buffers with `module`. `calls` are the submodule calls with one tensor in and one
    out, outermost first; a block that holds the whole of such a call runs the real submodule.
    """

    module: nn.Module
    program: fx.GraphModule
    graph: Graph
    calls: tuple[Call, ...] = ()
    donor: CutDonor | None = None
    _nodes: dict[str, fx.Node] = field(default_factory=dict, repr=False)

    def with_cuts(self, donor: CutDonor) -> Lowered:
        """The same network with its cuts known.

        Raises UsageError where there is none inside, or where the blocks in order are not exactly the network.
        """
        cut = replace(self, donor=donor, _nodes={node.name: node for node in self.program.graph.nodes})
        if len(donor.cuts) < 3:
            raise UsageError(f"donor {self.graph.name} has no cut: {uncut.reason(self.graph, cut._nodes)}")
        cut._check_blocks()
        return cut

    def _check_blocks(self) -> None:
        """Hold the units in order against the whole program on one image, so that no edit in place crosses a cut."""
        x = torch.rand(1, *self.graph.input.type.shape, generator=torch.Generator().manual_seed(0))
        with in_eval(self.module), in_eval(self.program), torch.no_grad():
            want, got = self.program(x.clone()), x
            for index in range(len(self.units)):
                got = self.block(index, index + 1).eval()(got.clone())
        if not torch.equal(got, want):
            raise UsageError(
                f"donor {self.graph.name} cannot be cut: its blocks in order do not give what the whole gives, because "
                f"a value is edited in place across a cut{uncut.edits(self._nodes.values())}"
            )

    @property
    def _cut(self) -> CutDonor:
        if self.donor is None:
            raise UsageError(f"network {self.graph.name} has not been cut yet: call derc.lower, or run the pass cut")
        return self.donor

    @property
    def cuts(self) -> tuple[Value, ...]:
        """Cut values in order, the input first and the output last."""
        return self._cut.cuts

    @property
    def units(self) -> tuple[Unit, ...]:
        """Costs between neighbouring cuts."""
        return self._cut.units

    def block(self, first: int, last: int) -> fx.GraphModule:
        """Units `first` … `last - 1` as a module from cut `first` to cut `last`, sharing the network's parameters.

        Raises UsageError unless 0 ≤ first < last ≤ number of units.
        """
        if not 0 <= first < last <= len(self.units):
            raise UsageError(f"block({first}, {last}) is not within the {len(self.units)} units of {self.graph.name}")
        graph = self.block_graph(first, last)
        used = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        block = fx.GraphModule({target: self.attribute(target) for target in used}, graph, class_name="Block")
        block.training = self.program.training
        return block

    def attribute(self, target: str) -> Any:
        """The live submodule, parameter or constant at the dotted path `target`."""
        found: Any = self.module
        for name in target.split("."):
            found = getattr(found, name, None)
        return operator.attrgetter(target)(self.program) if found is None else found

    def block_graph(self, first: int, last: int) -> fx.Graph:
        """The fx graph of a block, whole submodule calls folded back into one node each."""
        source, target = self.cuts[first].name, self.cuts[last].name
        names = self._between(source, target)
        folded = self._foldable(names, source, target)
        graph = fx.Graph()
        made: dict[str, fx.Node] = {source: graph.placeholder("x")}
        hidden = {name: call for call in folded for name in call.members}
        for name in names:
            call = hidden.get(name)
            if call is None:
                made[name] = graph.node_copy(self._nodes[name], lambda node: made[node.name])
            elif name == call.result:
                made[name] = graph.call_module(call.path, (made[call.argument],))
        graph.output(made[target])
        graph.lint()
        return graph

    def _between(self, source: str, target: str) -> list[str]:
        """Names of the values that `target` needs, in program order, `source` taken as given."""
        needed: set[str] = set()
        stack = [self._nodes[target]]
        while stack:
            node = stack.pop()
            if node.name not in needed and node.name != source:
                needed.add(node.name)
                stack.extend(node.all_input_nodes)
        return [node.name for node in self.program.graph.nodes if node.name in needed]

    def _foldable(self, names: Iterable[str], source: str, target: str) -> list[Call]:
        """The outermost calls that lie in the block as a whole and of which only the result is used outside."""
        inside, taken, chosen = set(names), set[str](), list[Call]()
        for call in self.calls:
            known = call.argument in inside or call.argument == source
            if not known or not call.members <= inside or not taken.isdisjoint(call.members):
                continue
            hidden = call.members - {call.result}
            if target in hidden or any(
                user.name not in call.members for name in hidden for user in self._nodes[name].users
            ):
                continue
            taken |= call.members
            chosen.append(call)
        return chosen
