"""The Python interface: compile, load, lower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from derc.lowered import Lowered


def compile(
    zoo: str = "digits",
    data: str = "digits",
    *,
    target: str = "cpu",
    out: str | Path = "out",
    quiet: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Compile `zoo` into the bundle `out`; returns what `derc compile --json` prints.

    `options` are those of the command line with underscores: latency_ms, params_m, macs_g, memory_mb, min_latency_ms,
    min_params_m, min_macs_g, max_blocks, interval, blocks, epsilon,
    solver, top, evaluations, objective, profile_s, probe, seed, threads, batch, engine, precision, emit, checkpoint,
    input_size, offline. Environment and derc.toml are not read. Raises the errors of `derc.errors`.
    """
    from derc.compiler import compile_bundle
    from derc.config import resolve
    from derc.console import Console
    from derc.summary import command_line, result

    flags = {"zoo": zoo, "data": data, "target": target, "output": str(out), **options}
    settings = resolve(flags, {}, None)
    return result(compile_bundle(settings, Console(quiet), command_line(settings)))


def load(bundle: str | Path, num_classes: int | None = None) -> nn.Module:
    """The module of a bundle in eval mode; `num_classes` gives it a fresh head.

    Raises IntegrityError where the bundle is not what derc wrote.
    """
    from derc.bundle import load as load_bundle

    return load_bundle(Path(bundle), num_classes)


def lower(module: nn.Module, input_shape: tuple[int, int, int], *, name: str = "network") -> Lowered:
    """Trace and cut `module` for images of `input_shape` (C, H, W): gives `.cuts`, `.units`, `.block(i, j)`.

    Raises UsageError where the forward pass depends on the data.
    """
    from derc.passes.cut import find_cuts
    from derc.passes.lower import lower as trace

    lowered = trace(module, input_shape, name=name)
    return lowered.with_cuts(find_cuts(lowered.graph))
