"""One network, examined: is it lowered, how finely is it cut, and do its blocks in order do exactly what it does?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from derc.exporting import Chain, export
from derc.ir import Graph
from derc.lowered import Lowered
from derc.passes.cut import dominators, find_cuts
from derc.passes.lower import lower
from derc.text import type_text

DROP_PATH = 0.1
"""Stochastic depth that networks are built with where they know the option, so that training has something to hide."""
ONNX_TOLERANCE = 1e-3
"""Allowed difference of a block's output in ONNX Runtime, as a share of its largest value (at least 1)."""
EXPORT_OPS = 6000
"""Networks of more operations than this are exported in blocks of fewer units, one file each."""


def make(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random weights and its input size: a timm name, or one that benchmarks/sources.py lists."""
    if ":" not in name:
        return make_timm(name)
    from benchmarks.sources import make_listed

    return make_listed(name)


def make_timm(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A timm network with random weights, stochastic depth and its native input size."""
    import timm

    options: dict[str, Any] = {"drop_path_rate": DROP_PATH}
    try:
        network = timm.create_model(name, **options)
    except TypeError:
        network = timm.create_model(name)
    channels, height, width = timm.data.resolve_data_config({}, model=network)["input_size"]
    return network, (channels, height, width)


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Give batch-norms statistics as if trained, and zero-initialised scales a size at which their branches count."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.uniform_(-0.1, 0.1, generator=generator)


def images(count: int, shape: tuple[int, int, int], seed: int = 1) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def compose(lowered: Lowered) -> nn.Sequential:
    """Every unit as a block of its own, in order."""
    return nn.Sequential(*(lowered.block(i, i + 1) for i in range(len(lowered.units))))


def examine(
    make: Callable[[], tuple[nn.Module, tuple[int, int, int]]], *, onnx: bool, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The benchmark's row of one network; `tell` gets it whenever there is news, so that a crash loses little."""
    row: dict[str, Any] = {}
    torch.manual_seed(0)
    start = time.perf_counter()
    network, shape = make()
    randomise(network)
    network.eval()
    row |= {"input": list(shape), "params": sum(p.numel() for p in network.parameters()), "build_s": _since(start)}
    reference = copy.deepcopy(network)
    start = time.perf_counter()
    lowered = lower(network, shape)
    chain = dominators(lowered.graph)
    lowered = lowered.with_cuts(find_cuts(lowered.graph))
    row |= {"lowered": True, "lower_s": _since(start), **_structure(lowered, chain)}
    tell(row)
    start = time.perf_counter()
    row |= _eval(lowered, reference, shape)
    row["eval_s"] = _since(start)
    tell(row)
    start = time.perf_counter()
    row |= _train(lowered, reference, shape)
    row["train_s"] = _since(start)
    tell(row)
    del reference
    if onnx:
        start = time.perf_counter()
        row |= _onnx(lowered, shape)
        row["onnx_s"] = _since(start)
        tell(row)
    return row


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def _structure(lowered: Lowered, chain: list[str]) -> dict[str, Any]:
    """Cuts and units against residual blocks; a cut between which and the next there is next to no work is thinned."""
    graph = lowered.graph
    return {
        "ops": len(graph.ops),
        "macs": graph.macs,
        "all_cuts": len(chain) - 2,
        "interior_cuts": len(lowered.cuts) - 2,
        "units": len(lowered.units),
        "residuals": residuals(graph),
        "largest_unit": round(max(unit.macs for unit in lowered.units) / max(graph.macs, 1), 3),
        "types": [type_text(cut.type) for cut in lowered.cuts[1:-1]],
    }


def residuals(graph: Graph) -> int:
    """Number of additions of two values that depend on the image: what closes a skip."""
    return sum(
        op.kind != "call_module"
        and op.target.rstrip("_") in ("add", "iadd")
        and len(set(op.inputs) & graph.dependent) == 2
        for op in graph.ops
    )


@torch.no_grad()
def _eval(lowered: Lowered, reference: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    x = images(2, shape)
    got, want = compose(lowered).eval()(x.clone()), reference.eval()(x.clone())
    if not torch.isfinite(want).all():
        return {"eval_exact": False, "reason": "the donor itself gives values that are not finite"}
    same = torch.equal(got, want)
    return {"eval_exact": same} if same else {"eval_exact": False, "reason": f"eval differs by {_largest(got, want)}"}


def _largest(got: torch.Tensor, want: torch.Tensor) -> str:
    return f"{float((got - want).abs().max()):.3g}"


def _train(lowered: Lowered, reference: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    """One step of SGD on both under one seed: outputs, gradients, running statistics and weights must be equal."""
    network = lowered.module.train()
    x = images(2 if any(isinstance(m, _BatchNorm) for m in network.modules()) else 1, shape, seed=2)
    reference.train()
    blocks = compose(lowered).train()
    got = _step(blocks, network, x)
    want = _step(reference, reference, x)
    wrong = None
    if not torch.equal(got, want):
        wrong = f"output differs by {_largest(got, want)}"
    for (name, mine), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        if (mine.grad is None) != (theirs.grad is None):
            wrong = wrong or f"gradient of {name} is missing on one side"
        elif mine.grad is not None and theirs.grad is not None and not torch.equal(mine.grad, theirs.grad):
            wrong = wrong or f"gradient of {name} differs by {_largest(mine.grad, theirs.grad)}"
    for (name, mine), theirs in zip(network.state_dict().items(), reference.state_dict().values(), strict=True):
        if not torch.equal(mine, theirs):
            wrong = wrong or f"{name} differs after a step by {_largest(mine.float(), theirs.float())}"
    return {"train_exact": wrong is None} | ({"reason": f"train: {wrong}"} if wrong else {})


def _step(network: nn.Module, owner: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    output: torch.Tensor = network(x.clone())
    output.square().mean().backward()
    with torch.no_grad():
        for parameter in owner.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    return output.detach()


@torch.no_grad()
def _onnx(lowered: Lowered, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Export all units in one file with every cut as an output, run it, and hold each cut against torch."""
    lowered.module.eval()
    chain = Chain(compose(lowered).eval())
    x = images(1, shape)
    names = tuple(f"cut{i}" for i in range(1, len(lowered.cuts)))
    model = export(chain, x, names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    want = chain(x.clone())
    got = session.run(list(names), {"input": x.numpy()})
    worst = 0.0
    for mine, theirs in zip(got, want, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        worst = max(worst, float(np.abs(mine - theirs.numpy()).max()) / scale)
    row = {"onnx_parity": bool(worst <= ONNX_TOLERANCE), "onnx_difference": worst}
    return row if row["onnx_parity"] else {**row, "onnx_reason": f"ONNX Runtime differs by {worst:.3g}"}


def source_line(error: BaseException) -> str:
    """An error's type and first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
