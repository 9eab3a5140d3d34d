"""The CIFAR-10 zoo of a shared folder: ten networks in `zoo/`, defined by `cifar_nets.py`, and images in `data/`."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from derc.data import Data, Split
from derc.donor import Donor
from derc.factories import make
from derc.zoo import Zoo

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def shared(zoo_dir: Path | None) -> Path | None:
    """The folder with zoo/ and data/: as given (its zoo/ will do), else DERC_SHARED, None where there is neither."""
    folder = zoo_dir or (Path(os.environ["DERC_SHARED"]) if os.environ.get("DERC_SHARED") else None)
    return folder.parent if folder is not None and (folder / "zoo.json").is_file() else folder


def load_zoo(folder: Path, scratch: Path) -> Zoo:
    """The networks that `folder`/zoo.json lists, with their weights, which are completed in `scratch`."""
    rows = json.loads((folder / "zoo.json").read_text(encoding="utf-8"))
    return Zoo("cifar", tuple(donor(row, folder, scratch) for row in rows))


def donor(row: dict[str, Any], folder: Path, scratch: Path) -> Donor:
    """One network; its definition is a call such as ``cifar_nets.CifarResNet([3]*3, shortcut='pad')``."""
    call = ast.parse(row["definition"], mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        raise ValueError(f"{row['definition']!r} is not a call")
    factory = f"cifar_nets:{call.func.attr}"
    kwargs = named(folder, call.func.attr, [literal(a) for a in call.args])
    kwargs |= {k.arg or "": literal(k.value) for k in call.keywords}
    return Donor(
        name=row["name"],
        factory=factory,
        kwargs=kwargs,
        weights=completed(row["name"], factory, kwargs, folder, scratch, row["weights"]),
        input_size=tuple(row["input"]),
        mean=tuple(map(float, row["mean"])),
        std=tuple(map(float, row["std"])),
        labels=CLASSES,
        licence=row["licence"],
        source=row["source"],
        folder=folder,
    )


def completed(name: str, factory: str, kwargs: dict[str, Any], folder: Path, scratch: Path, file: str) -> Path:
    """The weights with batch norms' counters, which the files leave out and strict loading asks for."""
    state, want = load_file(folder / file), make(name, factory, kwargs, folder).state_dict()
    counters = {key: value for key, value in want.items() if key.endswith("num_batches_tracked")}
    save_file({**counters, **state}, scratch / file)
    return scratch / file


def literal(node: ast.expr) -> Any:
    """A literal, or a list repeated: ``[3] * 3``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return literal(node.left) * literal(node.right)
    return ast.literal_eval(node)


def named(folder: Path, function: str, values: list[Any]) -> dict[str, Any]:
    """Positional arguments of a network's definition by name."""
    sys.path.insert(0, str(folder))
    try:
        signature = inspect.signature(getattr(importlib.import_module("cifar_nets"), function))
    finally:
        sys.path.remove(str(folder))
    return dict(zip(signature.parameters, values, strict=False))


def load_data(folder: Path, probe: int, validation: int, train: int, test: int) -> tuple[Data, Split]:
    """Data with probes of `x_train`, validation and held-out images of `x_test`, and as many other training images."""
    with np.load(folder / "cifar10.npz", allow_pickle=False) as arrays:
        x, y = arrays["x_train"], arrays["y_train"].astype(np.int64).ravel()
        u, v = arrays["x_test"], arrays["y_test"].astype(np.int64).ravel()
    splits = Split(x[:probe], y[:probe]), Split(u[:validation], v[:validation])
    heldout = Split(u[validation : validation + test], v[validation : validation + test])
    data = Data("cifar10", CLASSES, *splits, heldout)
    return data, Split(x[probe : probe + train], y[probe : probe + train])
