"""Donors of different native input sizes brought to one: as they are where they accept it, else rebuilt for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from derc.donor import Donor
from derc.errors import UsageError
from derc.factories import ONNX
from derc.resampling import options


class SizeError(UsageError):
    """A donor cannot be had for the input size asked for; the message is the reason."""


def meet(donors: Iterable[Donor], size: tuple[int, ...]) -> tuple[tuple[Donor, ...], dict[str, str]]:
    """The donors for images of `size`, (H, W) or (C, H, W), and the reason for each one left out, by name.

    Raises UsageError where none remains, or a donor cannot be built at any size.
    """
    kept, left = [], {}
    for donor in donors:
        try:
            kept.append(at_size(donor, size))
        except SizeError as error:
            left[donor.name] = str(error)
    if not kept:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise UsageError(f"no donor takes images of {'x'.join(map(str, size))} ({reasons}): give another --input-size")
    return tuple(kept), left


def at_size(donor: Donor, size: tuple[int, ...]) -> Donor:
    """The donor for images of `size`; raises SizeError where neither it nor its library's rebuilt form takes them."""
    wanted = (donor.input_size[0], size[-2], size[-1])
    if len(size) == 3 and size[0] != wanted[0]:
        raise SizeError(f"it takes {wanted[0]} channels, not {size[0]}")
    if donor.input_size == wanted:
        return donor
    if donor.factory.startswith(f"{ONNX}:"):
        return _file_at_size(donor, wanted)
    bare = replace(donor, weights=None, pretrained=False, input_size=wanted)
    module = bare.build()
    reasons = []
    try:
        bare.check_output(module)
        return replace(donor, input_size=wanted)
    except UsageError as error:
        reasons.append(_reason(error))
    for extra in options(donor.factory, (wanted[1], wanted[2])):
        kwargs = {**donor.kwargs, **extra}
        try:
            replace(bare, kwargs=kwargs, native=donor.kwargs).check()
            return replace(donor, kwargs=kwargs, native=donor.kwargs, input_size=wanted)
        except UsageError as error:
            reasons.append(_reason(error))
    raise SizeError(next((reason for reason in reasons if "resample" in reason), reasons[0]))


def _file_at_size(donor: Donor, size: tuple[int, int, int]) -> Donor:
    """The ONNX file's network at `size`, where the file leaves it open."""
    try:
        found = replace(donor, input_size=size)
        found.check()
    except UsageError as error:
        raise SizeError(_reason(error)) from error
    return found


def _reason(error: UsageError) -> str:
    return re.sub(r"^donor \S+( |: )", "", str(error))
