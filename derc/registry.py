"""Lazy tables from a name to ``"module:Class"``; importing this module loads no runtime."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from derc.engine import Engine, parse
from derc.errors import MissingDependencyError, UsageError, suggest

PASSES = {
    "lower": "derc.passes.lower:Lower",
    "cut": "derc.passes.cut:CutDonors",
    "embed": "derc.passes.embed:Embed",
    "partition": "derc.passes.partition:PartitionZoo",
    "adding": "derc.passes.adding:AddingParts",
    "stitchable": "derc.passes.stitchable:Stitchable",
    "profile": "derc.passes.profile:Profile",
    "select": "derc.passes.select:Select",
    "head": "derc.passes.head:FitHeads",
    "score": "derc.passes.score:Score",
    "stitch": "derc.passes.stitch:FitStitches",
    "recalibrate": "derc.passes.recalibrate:Recalibrate",
    "match": "derc.passes.match:Match",
    "emit": "derc.passes.emit:Emit",
    "package": "derc.passes.package:Package",
}
ENGINES = {
    "onnxruntime": "derc.backends.onnxruntime:OnnxRuntime",
    "openvino": "derc.backends.openvino:OpenVino",
    "inductor": "derc.backends.inductor:Inductor",
    "tensorrt": "derc.backends.tensorrt:TensorRt",
}
VARIANTS = {
    "onnxruntime": ("cuda", "tensorrt", "openvino"),
    "openvino": ("bf16",),
    "inductor": ("cuda",),
    "tensorrt": (),
}
"""Of our own engines, besides the plain one."""
SOLVERS = {"highs": "derc.backends.highs:Highs", "gurobi": "derc.backends.gurobi:Gurobi"}
PROXIES = {
    "accuracy": "derc.scoring.outputs:Accuracy",
    "kl": "derc.scoring.outputs:Divergence",
    "linear_probe": "derc.scoring.linear_probe:LinearProbe",
    "naswot": "derc.scoring.codes:Naswot",
    "jacov": "derc.scoring.jacobian:Jacov",
    "grad_norm": "derc.scoring.gradients:GradNorm",
    "snip": "derc.scoring.gradients:Snip",
    "synflow": "derc.scoring.synflow:SynFlow",
    "fisher": "derc.scoring.fisher:Fisher",
}
EXTRAS = {
    "onnxruntime": "cpu",
    "gurobipy": "gurobi",
    "tensorrt": "gpu",
    "openvino": "openvino",
    "nncf": "openvino",
    "pynvml": "gpu",
}


def known_engine(spec: str) -> None:
    """Raise UsageError unless there is an engine of this name and variant; what it needs is not looked at.

    Variants of engines that a plug-in brings are not looked at either.
    """
    known = entries(ENGINES, "derc.backends")
    name, variant = parse(spec)
    if name not in known:
        raise UsageError(f"unknown engine {name!r}, known: {', '.join(sorted(known))}{suggest(name, known)}")
    if variant and name in VARIANTS and variant not in VARIANTS[name]:
        named = ", ".join([name, *(f"{name}:{one}" for one in VARIANTS[name])])
        raise UsageError(f"unknown variant {spec}, known: {named}{suggest(variant, VARIANTS[name])}")


def open_engine(spec: str, threads: int = 0) -> Engine:
    """The engine written ``name`` or ``name:variant``.

    Raises UsageError for an unknown name or variant, MissingDependencyError where this machine lacks what it needs.
    """
    name, variant = parse(spec)
    engine: Engine = load(ENGINES, name)(threads=threads, variant=variant)
    return engine


def entries(table: dict[str, str], group: str) -> dict[str, str]:
    """`table` with the entry points of `group` added; an installed plug-in may not replace a name of ours."""
    plugins = {e.name: e.value for e in entry_points(group=group)}
    return plugins | table


def load(table: dict[str, str], name: str, group: str = "derc.backends") -> Any:
    """Import and return the object registered under `name`.

    Raises UsageError for an unknown name, MissingDependencyError where its package is not installed.
    """
    known = entries(table, group)
    if name not in known:
        raise UsageError(f"unknown name {name!r}, known: {', '.join(sorted(known))}{suggest(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        extra = EXTRAS.get(package)
        remedy = f'pip install "derc[{extra}]"' if extra else f"pip install {package}"
        raise MissingDependencyError(f"{name} needs the package {package}, which is not installed: {remedy}") from error
