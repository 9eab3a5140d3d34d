"""Python source of an assembled network that needs torch and the donors' own library alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from derc import factories, modules
from derc.artifacts import Array, Assembly, BlockRef, FittedHead
from derc.donor import Donor
from derc.lowered import Lowered
from derc.mode import MODE
from derc.onnxdonor.network import OnnxNetwork
from derc.onnxdonor.source import construction
from derc.parts import entry, parts
from derc.text import type_text
from derc.version import VERSION

TEMPLATE = '''"""{title}

Written by derc {version}. Needs {libraries}; the weights lie beside this file.
Input: float32 images (N, {channels}, {height}, {width}) in [0, 1]; normalisation is part of the network.
{precisions}"""

from pathlib import Path

{imports}

HEAD = {head!r}
"""Path of the last linear layer, which `build(num_classes)` replaces; None where the network has none."""


{helpers}{donors}


{blocks}


class Network(nn.Module):
    """{plan}"""

    def __init__(self) -> None:
        super().__init__()
{parts}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
{steps}
        return x


def build(num_classes: int | None = None, weights: str | Path | None = None) -> Network:
    """The network with its weights, in eval mode; with `num_classes`, a fresh linear head of that many outputs."""
    network = Network()
    network.load_state_dict(load_file(weights or Path(__file__).with_name("weights.safetensors")))
    if num_classes is not None:
        if HEAD is None:
            raise ValueError("this network does not end in a linear layer: replace its head by hand")
        owner, _, name = HEAD.rpartition(".")
        head = network.get_submodule(HEAD)
        setattr(network.get_submodule(owner), name, nn.Linear(head.in_features, num_classes))
    return network.eval()
'''


@dataclass
class Printed:
    """A network's source, and where each of its weights comes from."""

    source: str
    weights: dict[str, torch.Tensor]


@dataclass
class _Block:
    """One block class on its way to text."""

    lines: list[str] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)


def print_network(
    assembly: Assembly,
    donors: Mapping[str, Donor],
    lowered: Mapping[str, Lowered],
    states: Iterable[Mapping[str, torch.Tensor]],
    head: FittedHead | None = None,
    buffers: Sequence[Mapping[str, Array]] = (),
) -> Printed:
    """The module text of an assembly; `states` are those of what derc adds, in order, `head` its last block's own.

    `buffers`, where there are any, are those of each block that differ from its donor's, by path. Blocks that no stitch
    parts become one. It is float32 whatever the precisions of the blocks in the engine.
    """
    precisions, plan = _precisions(assembly), str(assembly)
    own = _merged_buffers(assembly, buffers)
    assembly = merged(assembly.plain)
    remaining = list(states)
    lines: list[str] = []
    steps: list[str] = []
    weights: dict[str, torch.Tensor] = {}
    printed: list[_Block] = []
    added: list[str] = []
    for part in parts(assembly, lowered):
        if isinstance(part.spec, BlockRef):
            text = _print_block(len(printed), part.spec, lowered[part.spec.donor])
            printed.append(text)
            call, state = f"Block{len(printed) - 1}()", {**text.weights, **_renamed(own[len(printed) - 1], text)}
        else:
            kind, arguments = part.call
            added.append(kind)
            call = f"{kind}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
            state = dict(remaining.pop(0))
        lines.append(f"        self.{part.name} = {call}")
        steps.append(f"        x = self.{part.name}(x)")
        weights |= {f"{part.name}.{key}": value for key, value in state.items()}
    if head is not None:
        weights |= _head_weights(head, len(assembly.blocks) - 1, printed[-1], weights)
    used = [donors[name] for name in assembly.donors]
    helpers = _helpers(added, printed)
    channels, height, width = entry(assembly, lowered).shape
    source = TEMPLATE.format(
        title=f"A network assembled from {', '.join(assembly.donors)}.",
        version=VERSION,
        libraries=_libraries(used),
        precisions=precisions,
        channels=channels,
        height=height,
        width=width,
        imports=_imports(printed, used, helpers),
        head="head.linear" if assembly.head else _head(assembly, lowered[assembly.blocks[-1].donor], printed[-1]),
        helpers=f"{helpers}\n\n\n" if helpers else "",
        donors="\n\n\n".join(_donor_function(donor, lowered[donor.name]) for donor in used),
        blocks="\n\n\n".join("\n".join(block.lines) for block in printed),
        plan=plan,
        parts="\n".join(lines),
        steps="\n".join(steps),
    )
    return Printed(source, weights)


def _precisions(assembly: Assembly) -> str:
    """Which blocks run in another precision where the network is deployed, as lines of the module's docstring."""
    lower: dict[str, list[str]] = {}
    for block in assembly.blocks:
        if block.plain is not block:
            lower.setdefault(block.precision, []).append(str(block.plain))
    lines = [f"In model.onnx and in the engine {precision} computes {', '.join(b)}." for precision, b in lower.items()]
    return "".join(f"{line}\n" for line in lines and [*lines, "Here everything is float32."])


def merged(assembly: Assembly) -> Assembly:
    """The same network with consecutive blocks of one donor as one block."""
    blocks = [assembly.blocks[0]]
    joints = [assembly.joint(0)]
    for index, block in enumerate(assembly.blocks[1:], start=1):
        joint = assembly.joint(index)
        if joint:
            blocks.append(block)
            joints.append(joint)
        else:
            blocks[-1] = replace(blocks[-1], last=block.last)
    return replace(assembly, blocks=tuple(blocks), joints=tuple(joints) if assembly.joints else ())


def _merged_buffers(assembly: Assembly, buffers: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """The blocks' own buffers after `merged`."""
    found: list[dict[str, Array]] = []
    for index in range(len(assembly.blocks)):
        own = dict(buffers[index]) if buffers else {}
        if index and not assembly.joint(index):
            found[-1] |= own
        else:
            found.append(own)
    return found


def _renamed(buffers: Mapping[str, Array], block: _Block) -> dict[str, torch.Tensor]:
    """Buffers by their donor's paths under the names that they have in the printed block."""
    found = {}
    for path, value in buffers.items():
        taken = next(one for one in block.attributes if path.startswith(f"{one}."))
        found[block.attributes[taken] + path[len(taken) :]] = torch.from_numpy(value.copy())
    return found


def _function(name: str) -> str:
    return "donor_" + re.sub(r"\W", "_", name)


def _libraries(donors: list[Donor]) -> str:
    """What the network needs, as a clause; an ONNX file needs nothing more."""
    others = {donor.factory.partition(":")[0].split(".")[0] for donor in donors} - {factories.ONNX}
    needed = ["torch", "safetensors", *sorted(others)]
    return f"{', '.join(needed[:-1])} and {needed[-1]}"


def _donor_function(donor: Donor, lowered: Lowered) -> str:
    _, call = factories.source(donor.factory, donor.kwargs)
    licence = f"{donor.source}; " if donor.source else ""
    if not call:
        return f"# {donor.name}: {donor.factory}, of which the blocks hold all ({licence}licence {donor.licence})."
    head = _head_lines(donor, lowered, call)
    return (
        f"def {_function(donor.name)}() -> nn.Module:\n"
        f'    """{donor.name}: {donor.factory} ({licence}licence {donor.licence})."""\n'
        f"{head or f'    return {call}'}"
    )


def _head_lines(donor: Donor, lowered: Lowered, call: str) -> str:
    """The donor's body where its head was fitted anew, which has another shape than its library's."""
    if donor.head is None:
        return ""
    owner, _, name = donor.head.path.rpartition(".")
    new = construction(lowered.attribute(donor.head.path), donor.name)
    place = _path(owner, lowered.module) if owner else "donor"
    return f"    donor = {call}\n    setattr({place}, {name!r}, {new})\n    return donor"


def _head_weights(
    head: FittedHead, index: int, block: _Block, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a head of the network's own under the names that they have in the printed network."""
    path = _printed_path(head.path, index, block)
    new = {"weight": torch.from_numpy(head.weight.copy()), "bias": torch.from_numpy(head.bias.copy())}
    return {f"{path}.{name}": value.reshape(weights[f"{path}.{name}"].shape) for name, value in new.items()}


def _imports(blocks: list[_Block], donors: list[Donor], helpers: str) -> str:
    lines = {line for block in blocks for line in block.imports}
    lines |= {factories.source(donor.factory, donor.kwargs)[0] for donor in donors}
    lines |= {"import torch", "from torch import nn", "from safetensors.torch import load_file"}
    if "F." in helpers:
        lines.add("import torch.nn.functional as F")
    return "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line)))


def _helpers(added: list[str], blocks: list[_Block]) -> str:
    normalises = "Stem" in added or any("Normalize(" in line for block in blocks for line in block.lines)
    wanted = (["Normalize"] if normalises else []) + list(dict.fromkeys(added))
    return "\n\n".join(inspect.getsource(getattr(modules, name)) for name in wanted).rstrip()


def _print_block(index: int, block: BlockRef, lowered: Lowered) -> _Block:
    """One block as a class whose submodules are taken from a fresh donor."""
    graph = lowered.block_graph(block.first, block.last)
    text = _Block()
    taken: list[str] = []
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target != MODE:
            target = str(node.target)
            if target not in text.attributes:
                text.attributes[target] = _attribute(target, text.attributes.values())
                taken.append(_take(target, text, lowered))
            node.target = text.attributes[target]
    code = graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if re.search(rf"\b{name}\b", code.src)}
    text.imports |= {line for line in (_import(name, value) for name, value in used.items()) if line}
    span = f"{type_text(lowered.cuts[block.first].type)} to {type_text(lowered.cuts[block.last].type)}"
    text.lines = [
        f"class Block{index}(nn.Module):",
        f'    """Units {block.first} to {block.last - 1} of {block.donor}: {span}."""',
        "",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        *([f"        donor = {_function(block.donor)}()"] if any("= donor" in line for line in taken) else []),
        *(f"        {line}" for line in taken),
        "",
        "    def forward(self, x: torch.Tensor) -> torch.Tensor:",
        *_body(code.src),
    ]
    return text


def _attribute(target: str, taken: Iterable[str]) -> str:
    """A name for what lies at the path `target` of a donor, a valid one (`layer_0` for `0`) that is not yet taken."""
    name = re.sub(r"\W", "_", target).removeprefix("_")
    name = f"layer_{name}" if name[:1].isdigit() else name
    while name in taken:
        name += "_"
    return name


def _body(source: str) -> list[str]:
    """The statements of an fx-generated forward, without the deletions that fx adds."""
    lines = []
    _, _, statements = source.partition("def forward(")
    for line in statements.splitlines()[1:]:
        statement = re.sub(r";  [\w = ]+ = None$", "", line).rstrip()
        if statement.strip() and not statement.endswith(" = None"):
            lines.append(f"    {statement}")
    return lines


def _take(target: str, text: _Block, lowered: Lowered) -> str:
    """The line that gives the block the donor's attribute at `target`; its weights are recorded."""
    name, value = text.attributes[target], lowered.attribute(target)
    if isinstance(value, modules.Normalize):
        mean, std = (tuple(round(float(v), 6) for v in t.flatten()) for t in (value.mean, value.std))
        text.weights |= {f"{name}.{key}": v for key, v in value.state_dict().items()}
        return f"self.{name} = Normalize(mean={mean}, std={std})"
    if not isinstance(value, (nn.Module, nn.Parameter)):
        text.weights[name] = value.detach()
        return f'self.register_buffer("{name}", torch.zeros({tuple(value.shape)}, dtype={value.dtype}))'
    if isinstance(value, nn.Module):
        text.weights |= {f"{name}.{key}": v for key, v in value.state_dict().items()}
    else:
        text.weights[name] = value.detach()
    return f"self.{name} = {_expression(target, value, lowered)}"


def _expression(target: str, value: Any, lowered: Lowered) -> str:
    """What makes the submodule or parameter at `target`: taken from the donor, or built where that is an ONNX file."""
    if isinstance(lowered.module, OnnxNetwork):
        return construction(value, lowered.graph.name)
    return _path(target, lowered.module)


def _path(target: str, module: nn.Module) -> str:
    """`target` as an expression on `donor`, with indices into sequences."""
    expression, owner = "donor", module
    for name in target.split("."):
        indexed = isinstance(owner, (nn.Sequential, nn.ModuleList)) and name.isdigit() and int(name) < len(owner)
        expression += f"[{name}]" if indexed else f".{name}" if name.isidentifier() else f'.get_submodule("{name}")'
        owner = getattr(owner, name)
    return expression


def _import(name: str, value: Any) -> str | None:
    """The import line of a global that generated code refers to."""
    if name == "torch" or getattr(value, "__module__", None) == "builtins":
        return None
    if inspect.ismodule(value):
        return f"import {value.__name__} as {name}" if value.__name__ != name else f"import {name}"
    if value is None or not hasattr(value, "__qualname__"):
        return f"from torch import {name}" if hasattr(torch, name) else None
    return f"from {value.__module__} import {value.__qualname__} as {name}"


PASS_THROUGH = ("flatten", "Identity", "Dropout", "dropout", "squeeze")


def _head(assembly: Assembly, lowered: Lowered, block: _Block) -> str | None:
    """Where the linear layer that gives the output lies in the printed network."""
    node = next(n for n in lowered.program.graph.nodes if n.op == "output").args[0]
    while isinstance(node, fx.Node):
        module = lowered.attribute(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Linear):
            return _printed_path(str(node.target), len(assembly.blocks) - 1, block)
        label = type(module).__name__ if module is not None else str(node.target)
        if not any(word in label for word in PASS_THROUGH):
            return None
        node = node.args[0] if node.args else None
    return None


def _printed_path(target: str, index: int, block: _Block) -> str | None:
    for taken, name in block.attributes.items():
        if target == taken or target.startswith(f"{taken}."):
            return f"block{index}.{name}{target[len(taken) :]}"
    return None
