"""Which of ONNX Runtime's wheels are installed: they all own one package, so that two of them break each other."""

from __future__ import annotations

from importlib import metadata

from derc.errors import MissingDependencyError

RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


def installed() -> dict[str, str]:
    """Versions of the installed wheels by name, in the order of `RUNTIMES`."""
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = metadata.version(name) or "of unknown version"
        except metadata.PackageNotFoundError:
            continue
    return found


def remedy(found: dict[str, str], wanted: str = "onnxruntime-gpu") -> str:
    """The commands that leave one wheel of those `found`: `wanted` where it is among them, else the first."""
    keep = wanted if wanted in found else next(iter(found))
    return f"pip uninstall -y {' '.join(found)}, then pip install {keep}"


def check_one(wanted: str) -> None:
    """Raise MissingDependencyError where two wheels are installed at once."""
    found = installed()
    if len(found) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in found.items())
        raise MissingDependencyError(
            f"{listed} are installed at once and overwrite each other: {remedy(found, wanted)}"
        )
