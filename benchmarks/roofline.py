"""How far the roofline's predictions are from the tables given: networks that the fit has not seen, one at a time.

    python benchmarks/roofline.py table.json … [--json FILE]

Tables come from `derc profile -o`. Each is judged alone, then each by factors from the others, then without any.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from derc.recorded import samples
from derc.roofline import Calibration, Sample, fit
from derc.tables import TableFile, read

Fitted = Callable[[str], Calibration]


def judged(table: TableFile, fitted: Fitted, stitches: bool) -> dict[str, float]:
    """Errors over the donors and blocks, or the stitches, each predicted by `fitted(its network)`."""
    known = samples([table], stitches=stitches)
    calibrations = {name: fitted(name) for name in {one.network for one in known}}
    ratios, held = [], []
    for one in known:
        latency = calibrations[one.network].predict(one.work, one.device, threads=one.threads, precision=one.precision)
        ratios.append(latency.ms / one.ms - 1)
        held.append(latency.low_ms <= one.ms <= latency.high_ms)
    errors = np.abs(ratios)
    return {
        "entries": len(errors),
        "networks": len(calibrations),
        "median_abs_error": float(np.median(errors)),
        "q75_abs_error": float(np.quantile(errors, 0.75)),
        "q90_abs_error": float(np.quantile(errors, 0.9)),
        "max_abs_error": float(errors.max()),
        "within_interval": float(np.mean(held)),
    }


def without(known: Sequence[Sample]) -> Fitted:
    """Factors from all networks of `known` but the one asked for."""
    return lambda name: fit([one for one in known if one.network != name])


def rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One row a table, kind of part and protocol."""
    tables = {path.stem: read(path) for path in paths}
    found = []
    for name, stitches in product(tables, (False, True)):
        own = samples([tables[name]], stitches=stitches)
        others = samples([other for key, other in tables.items() if key != name], stitches=stitches)
        protocols: dict[str, Fitted] = {
            "other networks of the table": without(own),
            "other networks of all tables": without([*own, *others]),
            "other tables": partial(lambda known, _: fit(known), others),
            "nothing": lambda _: Calibration(),
        }
        for protocol, fitted in protocols.items():
            if others or "tables" not in protocol:
                part = "stitches" if stitches else "donors and blocks"
                row = {"table": name, "part": part, "calibrated_by": protocol}
                found.append(row | judged(tables[name], fitted, stitches))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = rows(args.tables)
    for row in found:
        errors = ", ".join(f"{row[name]:.1%}" for name in ("median_abs_error", "q75_abs_error", "q90_abs_error"))
        print(
            f"{row['table']:<10} {row['part']:<17} by {row['calibrated_by']:<29} {row['entries']:>3} entries: {errors} "
            f"(50, 75, 90%), at most {row['max_abs_error']:.1%}; in interval {row['within_interval']:.0%}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"machine": platform.processor() or platform.machine(), "rows": found}, indent=1)
        )


if __name__ == "__main__":
    main()
