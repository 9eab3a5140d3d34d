"""Several latency budgets in one compile: what does not depend on the budget is done once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from derc import bundle
from derc.compiler import complete, prepare
from derc.config import CompileSettings
from derc.console import Console
from derc.errors import DercError, InfeasibleError, OverBudgetError
from derc.summary import command_line, result


def compile_budgets(every: Sequence[CompileSettings], console: Console) -> tuple[dict[str, Any], str]:
    """A bundle for each of the settings, which differ in latency budget and output; the results, and a table of them.

    A budget that nothing meets does not keep the others from being compiled. At the end it is raised as its
    InfeasibleError or OverBudgetError, which names the bundles that were written.
    """
    for settings in every:
        bundle.check_output(Path(settings.output))
    prepared = prepare(every[0], console)
    results, lines, failed = list[dict[str, Any]](), list[str](), list[tuple[CompileSettings, DercError]]()
    for settings in every:
        console.say(f"budget {settings.latency_ms:g} ms")
        try:
            manifest = complete(prepared, settings, console, command_line(settings))
        except (InfeasibleError, OverBudgetError) as error:
            failed.append((settings, error))
            continue
        results.append(result(manifest))
        lines.append(_line(manifest, settings))
    if failed:
        raise _failure(every, failed)
    return {"status": "ok", "compiles": results}, "\n".join(lines)


def _line(manifest: dict[str, Any], settings: CompileSettings) -> str:
    latency, accuracy = manifest["latency"], (manifest.get("accuracy") or {}).get("heldout")
    known = latency["measured_ms"] if latency["measured_ms"] is not None else latency["predicted_ms"]
    right = "" if accuracy is None else f"  held-out {accuracy:.1%}"
    network = manifest["selected"]["assembly"]
    return f"{settings.latency_ms:g} ms: {known:.4f} ms {latency['provenance']}{right}  {network}  {settings.output}"


def _failure(every: Sequence[CompileSettings], failed: Sequence[tuple[CompileSettings, DercError]]) -> DercError:
    """The first budget's error, with how many there are and where the other bundles went."""
    lost = {settings.latency_ms for settings, error in failed if isinstance(error, InfeasibleError)}
    written = ", ".join(str(settings.output) for settings in every if settings.latency_ms not in lost)
    told = "; ".join(f"{settings.latency_ms:g} ms: {error}" for settings, error in failed)
    others = f"; bundles were written to {written}" if written else ""
    return type(failed[0][1])(f"budgets not met, {len(failed)} of {len(every)}: {told}{others}")
