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
    "profile": "derc.passes.profile:Profile",
    "select": "derc.passes.select:Select",
    "score": "derc.passes.score:Score",
    "stitch": "derc.passes.stitch:FitStitches",
    "emit": "derc.passes.emit:Emit",
    "package": "derc.passes.package:Package",
}
ENGINES = {
    "onnxruntime": "derc.backends.onnxruntime:OnnxRuntime",
    "openvino": "derc.backends.openvino:OpenVino",
    "inductor": "derc.backends.inductor:Inductor",
    "tensorrt": "derc.backends.tensorrt:TensorRt",
}
SOLVERS = {"highs": "derc.backends.highs:Highs", "gurobi": "derc.backends.gurobi:Gurobi"}
EXTRAS = {
    "onnxruntime": "cpu",
    "gurobipy": "gurobi",
    "tensorrt": "gpu",
    "openvino": "openvino",
    "nncf": "openvino",
    "pynvml": "gpu",
}


def known_engine(spec: str) -> None:
    """Raise UsageError unless there is an engine of this name; its variant and what it needs are not looked at."""
    known = entries(ENGINES, "derc.backends")
    name, _ = parse(spec)
    if name not in known:
        raise UsageError(f"unknown engine {name!r}, known: {', '.join(sorted(known))}{suggest(name, known)}")


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
