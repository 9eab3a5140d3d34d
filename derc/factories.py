"""Calling what builds a donor: a timm name, or a function in the user's own package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derc.errors import UsageError, suggest

if TYPE_CHECKING:
    from torch import nn


def make(donor: str, factory: str, kwargs: Mapping[str, Any], folder: Path | None) -> nn.Module:
    """Call `factory` under a fixed seed, which leaves the global one as it was; `donor` is named in errors.

    Raises UsageError where the factory cannot be imported, raises, or returns no module.
    """
    import torch

    function = find(donor, factory, folder)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = function(**kwargs)
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
    if library == "timm" and name:
        return _timm(name)
    if not library or not name:
        raise UsageError(f"donor {donor}: factory {factory!r} is neither timm:NAME nor package.module:function")
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
    """Source of the module that an imported `factory` lies in; nothing for timm's, whose version is known."""
    library = factory.partition(":")[0]
    if library == "timm":
        import timm

        return str(timm.__version__).encode()
    file = getattr(sys.modules.get(library), "__file__", None)
    return Path(file).read_bytes() if file else b""


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _timm(name: str) -> Callable[..., Any]:
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no network {architecture!r}{suggest(architecture, timm.list_models())}")

    def create(**kwargs: Any) -> Any:
        return timm.create_model(name, **kwargs)

    return create


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
