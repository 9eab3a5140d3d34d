"""A zoo: donors with distinct names, and where they are listed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from derc.donor import Donor
from derc.errors import MissingDependencyError, UsageError, suggest

DIGITS = Path(__file__).parent / "digits" / "zoo.toml"
NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Zoo:
    """Donors with distinct names."""

    name: str
    donors: tuple[Donor, ...]

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
        check: Callable[[Donor], None] = Donor.check,
    ) -> Zoo:
        """The zoo `digits`, ``timm:NAME[,NAME…]`` or a TOML file; `check` builds every donor and runs it once.

        `checkpoint` holds the weights of a single timm network; `offline` refuses donors that need the hub.
        Raises UsageError, and MissingDependencyError where the hub cannot be reached.
        """
        from derc.zoofile import read_toml, timm_donor

        if checkpoint is not None and (not spec.startswith("timm:") or "," in spec):
            raise UsageError(f"--checkpoint goes with one timm network, --zoo timm:NAME, not with --zoo {spec}")
        if spec == "digits":
            zoo = cls("digits", read_toml(DIGITS))
        elif spec.startswith("timm:"):
            names = [name.strip() for name in spec.removeprefix("timm:").split(",")]
            zoo = cls(spec, tuple(timm_donor(name, checkpoint) for name in names))
        else:
            path = _existing(spec)
            zoo = cls(path.stem, read_toml(path))
        zoo.check(offline=offline, check=check)
        return zoo

    def check(self, *, offline: bool = False, check: Callable[[Donor], None] = Donor.check) -> None:
        """Raise UsageError unless names are valid and distinct and every donor runs at its input size."""
        for number, donor in enumerate(self.donors):
            if not NAME.fullmatch(donor.name):
                raise UsageError(f"donor name {donor.name!r} may only have letters, digits and the characters _ . -")
            if donor.name in self.names[:number]:
                raise UsageError(f"zoo {self.name} has two donors called {donor.name!r}: names must be distinct")
            if offline and donor.pretrained:
                raise MissingDependencyError(
                    f"donor {donor.name} needs the hub and this run is offline: give a file with --checkpoint"
                )
            check(donor)


def _existing(spec: str) -> Path:
    """The zoo file at `spec`; raises UsageError where there is none."""
    path = Path(spec)
    if path.is_file():
        return path
    if path.suffix == ".toml" or path.name != spec:
        raise UsageError(f"zoo file {spec} does not exist or is not a file")
    raise UsageError(f"unknown zoo {spec!r}: give digits, timm:NAME[,NAME…] or a TOML file{suggest(spec, ['digits'])}")
