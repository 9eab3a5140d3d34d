"""How far the roofline's predictions are from the tables given: networks that the fit has not seen, one at a time.

    python benchmarks/roofline.py table.json … [--json FILE]

Tables come from `derc profile -o`. Each is judged alone, then each by factors from the others, then without any.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from derc.recorded import samples
from derc.roofline import Calibration, Sample, fit
from derc.tables import TableFile, read

Fitted = Callable[[str], Calibration]


def judged(table: TableFile, fitted: Fitted) -> dict[str, float]:
    """Errors over what the table measured, each predicted by `fitted(its network)`."""
    known = samples([table])
    entries = [e for e in table.entries if e.work is not None and e.provenance == "measured"]
    calibrations = {name: fitted(name) for name in {one.network for one in known}}
    ratios, held = [], []
    for one in known:
        latency = calibrations[one.network].predict(one.work, one.device, threads=one.threads, precision=one.precision)
        ratios.append(latency.ms / one.ms - 1)
        held.append(latency.low_ms <= one.ms <= latency.high_ms)
    errors = np.abs(ratios)
    whole = errors[[entry.kind == "donor" for entry in entries]]
    return {
        "entries": len(errors),
        "networks": len(calibrations),
        "median_abs_error": float(np.median(errors)),
        "q75_abs_error": float(np.quantile(errors, 0.75)),
        "q90_abs_error": float(np.quantile(errors, 0.9)),
        "max_abs_error": float(errors.max()),
        "block_median_abs_error": float(np.median(errors[[entry.kind == "block" for entry in entries]])),
        "whole_median_abs_error": float(np.median(whole)),
        "whole_max_abs_error": float(whole.max()),
        "within_interval": float(np.mean(held)),
    }


def without(known: Sequence[Sample]) -> Fitted:
    """Factors from all networks of `known` but the one asked for."""
    return lambda name: fit([one for one in known if one.network != name])


def rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One row a table and protocol."""
    tables = {path.stem: read(path) for path in paths}
    found = []
    for name, table in tables.items():
        others = samples([other for key, other in tables.items() if key != name])
        everything = samples(tables.values())
        protocols: dict[str, Fitted] = {
            "other networks of the table": without(samples([table])),
            "other networks of all tables": without(everything),
            "other tables": lambda _, others=others: fit(others),  # type: ignore[misc]
            "nothing": lambda _: Calibration(),
        }
        for protocol, fitted in protocols.items():
            if others or "tables" not in protocol:
                found.append({"table": name, "calibrated_by": protocol, **judged(table, fitted)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = rows(args.tables)
    for row in found:
        errors = ", ".join(f"{row[name]:.1%}" for name in ("median_abs_error", "q75_abs_error", "q90_abs_error"))
        parts = f"blocks {row['block_median_abs_error']:.1%}, whole networks {row['whole_median_abs_error']:.1%}"
        print(
            f"{row['table']:<10} by {row['calibrated_by']:<29} {row['entries']} entries: {errors} (50, 75, 90%); "
            f"{parts}, at most {row['whole_max_abs_error']:.1%}; in interval {row['within_interval']:.0%}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"machine": platform.processor() or platform.machine(), "rows": found}, indent=1)
        )


if __name__ == "__main__":
    main()
