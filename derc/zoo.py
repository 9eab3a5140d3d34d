"""A zoo: donors with distinct names, and where they are listed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from derc.donor import Donor
from derc.errors import UsageError, suggest
from derc.factories import LIBRARIES, ONNX

PRESETS = {"digits": "digits/zoo.toml", "dery24": "presets/dery24.toml"}
"""Zoos that come with derc, by name."""
NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Zoo:
    """Donors with distinct names; `left_out` says why others cannot be used at the input size asked for."""

    name: str
    donors: tuple[Donor, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Donor:
        """The donor called `name`; raises UsageError where there is none."""
        for donor in self.donors:
            if donor.name == name:
                return donor
        raise UsageError(f"zoo {self.name} has no donor {name!r}{suggest(name, self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(donor.name for donor in self.donors)

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        checkpoint: Path | None = None,
        offline: bool = False,
        input_size: tuple[int, ...] | None = None,
        check: Callable[[Donor], object] = Donor.check,
    ) -> Zoo:
        """A zoo of PRESETS, a library's networks, ``timm:NAME[,NAME…]``, ``onnx:FILE[,FILE…]``, or a TOML file.

        `check` builds every donor and runs it once. `checkpoint` holds the weights of a single library's network;
        where `offline`, published weights come from the local hub caches alone. With `input_size`, (H, W) or
        (C, H, W), donors are brought to it, and those left out that cannot be. Raises UsageError, and
        MissingDependencyError where published weights cannot be had.
        """
        from derc.sizes import meet

        zoo = cls(*_donors(spec, checkpoint, offline))
        zoo.check(check=lambda _: None)
        if input_size is not None:
            zoo = cls(zoo.name, *meet(zoo.donors, input_size))
        zoo.check(check=check)
        return zoo

    def check(self, *, check: Callable[[Donor], object] = Donor.check) -> None:
        """Raise UsageError unless names are valid and distinct and every donor runs at its input size."""
        for number, donor in enumerate(self.donors):
            if not NAME.fullmatch(donor.name):
                raise UsageError(f"donor name {donor.name!r} may only have letters, digits and the characters _ . -")
            if donor.name in self.names[:number]:
                raise UsageError(f"zoo {self.name} has two donors called {donor.name!r}: names must be distinct")
            check(donor)


def _donors(spec: str, checkpoint: Path | None, offline: bool) -> tuple[str, tuple[Donor, ...]]:
    """Name and donors of the zoo that `spec` names."""
    from derc.zoofile import file_donor, library_donor, read_toml

    library, _, names = spec.partition(":")
    if checkpoint is not None and (library not in LIBRARIES or "," in names):
        raise UsageError(f"--checkpoint goes with one network of a library, --zoo timm:NAME, not with --zoo {spec}")
    if library in LIBRARIES:
        factories = [f"{library}:{name.strip()}" for name in names.split(",")]
        return spec, tuple(library_donor(factory, checkpoint, offline) for factory in factories)
    if library == ONNX:
        return spec, tuple(file_donor(name.strip()) for name in names.split(","))
    if spec in PRESETS:
        return spec, read_toml(Path(__file__).parent / PRESETS[spec], offline)
    path = _existing(spec)
    return path.stem, read_toml(path, offline)


def _existing(spec: str) -> Path:
    """The zoo file at `spec`; raises UsageError where there is none."""
    path = Path(spec)
    if path.is_file():
        return path
    if path.suffix == ".toml" or path.name != spec:
        raise UsageError(f"zoo file {spec} does not exist or is not a file")
    raise UsageError(
        f"unknown zoo {spec!r}: give {', '.join(PRESETS)}, timm:NAME[,NAME…], torchvision:…, transformers:…, "
        f"onnx:FILE or a TOML file{suggest(spec, PRESETS)}"
    )
