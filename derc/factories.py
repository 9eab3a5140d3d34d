"""Calling what builds a donor: a library's network by name, or a function in the user's own package."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derc import huggingface
from derc.errors import DercError, UsageError, suggest

if TYPE_CHECKING:
    from torch import nn


def make(donor: str, factory: str, kwargs: Mapping[str, Any], folder: Path | None) -> nn.Module:
    """Call `factory` under a fixed seed, which leaves the global one as it was; `donor` is named in errors.

    Raises UsageError where the factory cannot be imported, raises, or returns no module.
    """
    import torch

    function = find(donor, factory, folder)
    try:
        with naming(donor), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = function(**kwargs)
    except DercError:
        raise
    except Exception as error:  # the factory is the user's code
        raise UsageError(f"donor {donor}: {factory} failed: {first_line(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"donor {donor}: {factory} returned a {type(module).__name__}, not a torch.nn.Module")
    return module


def find(donor: str, factory: str, folder: Path | None) -> Callable[..., Any]:
    """The function that `factory` names; `folder` is on the import path while it is imported.

    Raises UsageError where there is none.
    """
    library, _, name = factory.partition(":")
    if library in LIBRARIES and name:
        with naming(donor):
            return LIBRARIES[library](name)
    if library == ONNX and name:
        return partial(_onnx, onnx_path(factory, folder))
    if not library or not name:
        schemes = ", ".join(f"{scheme}:NAME" for scheme in LIBRARIES)
        raise UsageError(
            f"donor {donor}: factory {factory!r} is neither {schemes}, onnx:FILE nor package.module:function"
        )
    try:
        with _on_path(folder):
            module = importlib.import_module(library)
    except Exception as error:  # the module is the user's code
        raise UsageError(f"donor {donor}: cannot import {library}: {first_line(error)}") from error
    _check_origin(donor, library, folder)
    found: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UsageError(f"donor {donor}: {library} has no function {name!r}{suggest(name, known)}")
    return found


def source_bytes(factory: str) -> bytes:
    """Source of the module that an imported `factory` lies in; the version alone for a library's."""
    library = factory.partition(":")[0]
    if library in LIBRARIES or library == ONNX:
        return metadata.version(library).encode()
    file = getattr(sys.modules.get(library), "__file__", None)
    return Path(file).read_bytes() if file else b""


def onnx_path(factory: str, folder: Path | None) -> Path:
    """Where the file of an ``onnx:FILE`` lies, as seen from `folder`."""
    return (folder or Path()) / factory.partition(":")[2]


def source(factory: str, kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """The import line and the expression that build the network where derc is not installed.

    No expression for an ONNX file: its blocks are printed in full.
    """
    library, _, name = factory.partition(":")
    arguments = [f"{key}={value!r}" for key, value in kwargs.items()]
    match library:
        case "timm":
            return "import timm", f"timm.create_model({', '.join([repr(name), 'pretrained=False', *arguments])})"
        case "torchvision":
            quiet = [f"{key}={value!r}" for key, value in _unwarned(name, kwargs).items()]
            call = ", ".join([repr(architecture(name)), "weights=None", *quiet, *arguments])
            return "import torchvision", f"torchvision.models.get_model({call})"
        case "transformers":
            return "import transformers", huggingface.source(name, kwargs)
        case "onnx":
            return "import torch", ""
    alias = re.sub(r"\W", "_", factory)
    return f"from {library} import {name} as {alias}", f"{alias}({', '.join(arguments)})"


@contextmanager
def naming(donor: str) -> Iterator[None]:
    """Say in an error of the body which donor it is about."""
    try:
        yield
    except DercError as error:
        raise type(error)(f"donor {donor}: {error}") from error


def architecture(name: str) -> str:
    """The network of a name that may end in a tag of its weights, ``resnet50.a1_in1k``."""
    return name.partition(".")[0]


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message, with the second where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _onnx(path: Path, **kwargs: Any) -> Any:
    from derc.onnxdonor.network import build

    return build(path, **kwargs)


def _timm(name: str) -> Callable[..., Any]:
    import timm

    if not timm.is_model(architecture(name)):
        raise UsageError(f"timm has no network {architecture(name)!r}{suggest(architecture(name), timm.list_models())}")

    def create(**kwargs: Any) -> Any:
        return timm.create_model(name, **kwargs)

    return create


def _torchvision(name: str) -> Callable[..., Any]:
    from torchvision import models

    known = models.list_models(module=models)
    if architecture(name) not in known:
        raise UsageError(f"torchvision has no classifier {architecture(name)!r}{suggest(architecture(name), known)}")

    def create(**kwargs: Any) -> Any:
        return models.get_model(architecture(name), weights=None, **_unwarned(name, kwargs), **kwargs)

    return create


def _unwarned(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What keeps torchvision from a slow initialisation and a warning about it."""
    slow = architecture(name) in ("googlenet", "inception_v3") and "init_weights" not in kwargs
    return {"init_weights": False} if slow else {}


LIBRARIES: dict[str, Callable[[str], Callable[..., Any]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": huggingface.find,
}
"""What finds a network by its name, for each library whose networks derc knows."""
ONNX = "onnx"
"""The factory ``onnx:FILE`` is no library: the file is the network, with its weights."""


@contextmanager
def _on_path(folder: Path | None) -> Iterator[None]:
    """Put `folder` first on the import path while the body runs."""
    if folder is None:
        yield
        return
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


def _check_origin(donor: str, library: str, folder: Path | None) -> None:
    """Raise UsageError where `folder` has the package, but one of the same name was imported from elsewhere before."""
    package = library.partition(".")[0]
    if folder is None or not ((folder / f"{package}.py").is_file() or (folder / package / "__init__.py").is_file()):
        return
    origin = getattr(sys.modules[package], "__file__", None)
    if origin is None or not Path(origin).resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"donor {donor}: the package {package} in {folder} is hidden by {origin or 'a built-in one'}: rename it"
        )
