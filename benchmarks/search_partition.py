"""Similarity and partition side by side with what they replace: rows for benchmarks/search.py.

Every row says what was run. A time that was not run in full says so: `extrapolated_from` is how much of it was. All
times are of one process, one after the other, in the threads that the process has; on a machine that others use too,
`cpu_seconds` is what the work took of the processor.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from benchmarks import published
from benchmarks.zoos import Synthetic, synthetic
from derc import (
    equivalence_centres,
    equivalence_checks,
    equivalence_program,
    equivalence_search,
    equivalence_sketch,
    streaming,
)
from derc import similarity as alike
from derc.artifacts import Array
from derc.backends.highs import Highs
from derc.equivalence import Zoo
from derc.passes.partition import PartitionZoo

Row = dict[str, Any]
Out = TypeVar("Out")
CUTS = 16
SEEDS = (0, 1, 2)
STARTS = PartitionZoo().starts
PAIRS = 100
WIDTHS = (256, 512, 1024, 2048, 4096)
"""Features per image, pooled maps to whole ones, that donors' cuts go through from output to input."""


def timed(work: Callable[[], Out]) -> tuple[float, Out]:
    """Seconds and result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def similarity_rows(quick: bool = False) -> list[Row]:
    """All pairs of 24 donors × 16 cuts against pair-by-pair recomputation, errors, and growth up to 1,000 donors."""
    images, donors = (512, 24) if quick else (2048, 24)
    rows = [_against_pairs(donors, images, estimator) for estimator in (("cka",) if quick else ("cka", "cka-debiased"))]
    rows += [_errors(estimator, 96 if quick else 256) for estimator in alike.ESTIMATORS]
    rows.append(_streaming_error(quick))
    rows += [_growth(count, 128 if quick else 1024) for count in ((24, 100) if quick else (24, 100, 300, 500))]
    rows.append(_sketched(100 if quick else 1000, 128 if quick else 1024))
    return rows


def _features(donors: int, images: int, seed: int = 0) -> Iterator[list[Array]]:
    """One donor after another, features (images, p) float32 at each cut, smooth along depth, alike across donors."""
    random = np.random.default_rng(seed)
    common = random.standard_normal((4, images, 24)).astype(np.float32)
    for _ in range(donors):
        made = []
        for depth in np.linspace(0, 1, CUTS):
            width = WIDTHS[int((1 - depth) * (len(WIDTHS) - 1) + 0.5)]
            weight = np.maximum(0, 1 - np.abs(3 * depth - np.arange(4))).astype(np.float32)
            mixed = np.tensordot(weight, common, 1) @ random.standard_normal((24, width), np.float32)
            made.append(mixed + 2 * random.standard_normal((images, width), np.float32) + 1)
        yield made


def pair_by_pair(x: Array, y: Array, estimator: str) -> float:
    """One pair's similarity from its features, as a function of two arguments is usually written, in their precision.

    The Gram form; the form in feature space takes p² in place of n² and is slower for features wider than images.
    """
    grams = []
    for part in (x, y):
        centred = part - part.mean(axis=0)
        gram = centred @ centred.T
        grams.append(alike.u_centre(gram) if estimator == "cka-debiased" else gram)
    k, m = grams
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def in_feature_space(x: Array, y: Array) -> float:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return float(np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))


def _against_pairs(donors: int, images: int, estimator: str) -> Row:
    """derc over all cuts in full; 100 pairs, drawn at random over the zoo, timed, and errors taken in float64."""
    count, random, spent = donors * CUTS, np.random.default_rng(1), 0.0
    kept, products = dict[int, Array](), alike.Products(donors * CUTS, images, estimator)
    wanted = sorted(random.choice(count, 2 * PAIRS // 10, replace=False).tolist())
    for donor, features in enumerate(_features(donors, images)):
        seconds, _ = timed(lambda part=features: [_collect(products, values, estimator) for values in part])
        spent += seconds
        kept |= {i: features[i - donor * CUTS] for i in wanted if i // CUTS == donor}
    seconds, found = timed(products.similarity)
    pairs = [(a, b) for i, a in enumerate(wanted) for b in wanted[:i]]
    chosen = [pairs[i] for i in random.choice(len(pairs), PAIRS, replace=False)]
    baseline, _ = timed(lambda: [pair_by_pair(kept[a], kept[b], estimator) for a, b in chosen])
    row = {
        "part": "similarity",
        "what": f"{donors} donors x {CUTS} cuts, {images} probes, {alike.ESTIMATORS[estimator]}",
        "seconds": spent + seconds,
        "product_seconds": seconds,
        "pairs": count * (count - 1) // 2,
        "baseline": "each pair from its features, Gram form, float32",
        "baseline_seconds": baseline / PAIRS * count * (count - 1) / 2,
        "extrapolated_from": f"{PAIRS} pairs",
        "max_error": max(abs(found[a, b] - _truth(kept[a], kept[b], estimator)) for a, b in chosen[::5]),
        "memory_mb": products.left.nbytes / 1e6,
    }
    if estimator == "cka":
        other, _ = timed(lambda: [in_feature_space(kept[a], kept[b]) for a, b in chosen[::4]])
        row["feature_space_seconds"] = other / len(chosen[::4]) * count * (count - 1) / 2
    return row | {"speedup": row["baseline_seconds"] / row["seconds"]}


def _collect(products: alike.Products, values: Array, estimator: str) -> None:
    products.add(alike.flatten(alike.kernel(values, estimator), estimator))


def _truth(x: Array, y: Array, estimator: str) -> float:
    return min(max(pair_by_pair(x.astype(np.float64), y.astype(np.float64), estimator), 0.0), 1.0)


def _errors(estimator: str, images: int) -> Row:
    """Every estimator's largest error against float64 from the features, for values of all widths."""
    values = [part[:, : 8 * images] for part in next(_features(1, images, seed=2))]
    found = alike.similarity(values, estimator)
    truth = DIRECT[estimator]
    pairs = [(a, b) for a in range(CUTS) for b in range(a)][::3]
    wide = [part.astype(np.float64) for part in values]
    error = max(abs(found[a, b] - min(max(truth(wide[a], wide[b]), 0.0), 1.0)) for a, b in pairs)
    return {
        "part": "similarity",
        "what": f"error of {alike.ESTIMATORS[estimator]}, {images} probes",
        "pairs": len(pairs),
        "max_error": float(error),
    }


def _direct_rbf(x: Array, y: Array) -> float:
    grams = []
    for part in (x, y):
        distance = np.stack([np.linalg.norm(part - row, axis=1) for row in part])
        median = np.median(distance[np.triu_indices(len(part), 1)] ** 2)
        gram = np.exp(-(distance**2) / (2 * alike.BANDWIDTH**2 * median))
        grams.append(gram - gram.mean(axis=0) - gram.mean(axis=1, keepdims=True) + gram.mean())
    k, m = grams
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def _direct_r2(x: Array, y: Array) -> float:
    def share(one: Array, other: Array) -> float:
        left, values, _ = np.linalg.svd(one, full_matrices=False)
        fitted = (left * (values**2 / (values**2 + (one**2).sum() / len(one)))) @ (left.T @ other)
        return float(1 - ((other - fitted) ** 2).sum() / (other**2).sum())

    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return (share(x, y) / share(y, y) + share(y, x) / share(x, x)) / 2


DIRECT: dict[str, Callable[[Array, Array], float]] = {
    "cka": in_feature_space,
    "cka-debiased": lambda x, y: pair_by_pair(x, y, "cka-debiased"),
    "rbf": _direct_rbf,
    "r2": _direct_r2,
}


def _streaming_error(quick: bool) -> Row:
    """The mean error of 1,024 probes in batches of 64 against the debiased similarity of many more images."""
    images, many = 1024, 4096 if quick else 8192
    values = [part[:, :64] for part in next(_features(1, many, seed=3))]
    truth = alike.similarity(values, "cka-debiased")
    errors, biased = [], []
    upper = np.triu_indices(CUTS, 1)
    for start in range(0, many, images):
        part = [value[start : start + images] for value in values]
        errors.append(np.abs(_stream(part).similarity() - truth)[upper].mean())
        biased.append(np.abs(_stream_biased(part) - truth)[upper].mean())
    return {
        "part": "similarity",
        "what": f"{images} probes in batches of {streaming.BATCH} against {many} at once",
        "mean_error": float(np.mean(errors)),
        "mean_error_of_averaged_biased_batches": float(np.mean(biased)),
    }


def _stream(values: list[Array]) -> streaming.Streamed:
    bounds, products = streaming.bounds(len(values[0])), streaming.Streamed(len(values))
    for number, (first, last) in enumerate(bounds):
        part = [value[first:last] for value in values]
        products.add(streaming.vectors(part, (last - first) / len(values[0]), "cka"), 2 * number // len(bounds))
    return products


def _stream_biased(values: list[Array]) -> Array:
    parts = [alike.similarity([value[a:b] for value in values]) for a, b in streaming.bounds(len(values[0]))]
    return np.mean(parts, axis=0)


def _growth(donors: int, images: int) -> Row:
    """The streamed form's products of all pairs of cuts, whose memory depends on the number of cuts alone."""
    count, random = donors * CUTS, np.random.default_rng(0)
    products, spent = streaming.Streamed(count), 0.0
    bounds = streaming.bounds(images)
    length = (bounds[0][1] - bounds[0][0]) * (bounds[0][1] - bounds[0][0] - 1) // 2
    measured = min(len(bounds), 2)
    for number in range(measured):
        parts = random.standard_normal((count, length), np.float32)
        seconds, _ = timed(lambda part=parts, half=number: products.add(part, half))
        spent += seconds
    return {
        "part": "similarity",
        "what": f"streamed products, {donors} donors x {CUTS} cuts, {images} probes",
        "cuts": count,
        "seconds": spent / measured * len(bounds),
        "extrapolated_from": f"{measured} of {len(bounds)} batches",
        "memory_mb": products.halves.nbytes / 1e6,
    }


def _sketched(donors: int, images: int) -> Row:
    """The sketched form of a large zoo, from features to rows; timed over some donors' cuts."""
    bounds = streaming.bounds(images)
    sketch, sample = streaming.Sketched(len(bounds)), 10
    features = [[part[:, :512] for part in donor] for donor in _features(2, images)]

    def project(parts: list[Array]) -> None:
        for number, (first, last) in enumerate(bounds):
            sketch.project(streaming.vectors([part[first:last] for part in parts], 1.0, "cka"), number)

    project(features[0])
    seconds, _ = timed(lambda: [project(features[i % 2]) for i in range(sample)])
    return {
        "part": "similarity",
        "what": f"sketched rows, {donors} donors x {CUTS} cuts, {images} probes, 512 features",
        "cuts": donors * CUTS,
        "seconds": seconds / sample * donors,
        "extrapolated_from": f"{sample} donors",
        "memory_mb": donors * CUTS * sketch.size * 4 / 1e6,
    }


def partition_rows(quick: bool = False) -> list[Row]:
    """Zoos of 8 to 10,000 donors against the published search, the exact program at 8, both forms where both can be."""
    sizes = (8, 24, 100) if quick else (8, 24, 100, 1000)
    rows = [_partition(donors, seed, quick) for donors in sizes for seed in SEEDS]
    rows += [_memory(donors) for donors in ((50, 150) if quick else (100, 300, 1000))]
    rows += [
        _large(donors, seed) for donors in ((300,) if quick else (1000, 10_000)) for seed in SEEDS[: 1 if quick else 3]
    ]
    return rows


def _partition(donors: int, seed: int, quick: bool) -> Row:
    made = synthetic(donors, seed, None if donors <= 100 else streaming.SKETCH)
    matrix = None if donors > 100 else made.zoo(sketched=False)
    zoo = made.zoo(sketched=True) if matrix is None else matrix
    used, repeats = time.process_time(), 5 if donors <= 24 else 1
    runs = [timed(lambda: _search(zoo, seed)) for _ in range(repeats)]
    used = (time.process_time() - used) / repeats
    seconds, cuts = float(np.median([spent for spent, _ in runs])), runs[0][1]
    value = float(zoo.objective(cuts[None])[0])
    row: Row = {
        "part": "partition",
        "what": f"{donors} donors, {made.cuts} cuts, seed {seed}",
        "donors": donors,
        "seed": seed,
        "form": "sketched" if matrix is None else "matrix",
        "objective": value,
        "seconds": seconds,
        "cpu_seconds": used,
        "valid": valid(zoo, cuts),
        "distinct": equivalence_checks.distinctness(zoo, cuts),
    }
    row |= _published(zoo, seed, value, seconds, used, *_restarts(donors, quick))
    if matrix is not None:
        rows = synthetic(donors, seed, streaming.SKETCH).zoo(sketched=True)
        spent, other = timed(lambda: equivalence_sketch.search(rows, STARTS, seed))
        row |= {"sketched_seconds": spent, "sketched_ratio": float(matrix.objective(other[None])[0]) / value}
        row |= _centred(matrix, cuts, seed)
    if matrix is not None and donors == 8:
        spent, (exact, bound) = timed(lambda: equivalence_program.solve(matrix, Highs(), 120.0))
        row |= {"exact_seconds": spent, "gap": max(bound - value, 0.0) / value, "exact_found": exact is not None}
    return row


def _search(zoo: Zoo, seed: int) -> Array:
    search = equivalence_search.search if zoo.rows is None else equivalence_sketch.search
    return search(zoo, STARTS, seed)


def _restarts(donors: int, quick: bool) -> tuple[int, int]:
    """Restarts whose best counts, and restarts that are timed as the text has them, one candidate after another."""
    if quick:
        return {8: 100, 24: 40}.get(donors, 3), {8: 20, 24: 10}.get(donors, 1)
    return {8: 200, 24: 200, 100: 200}.get(donors, 40), {8: 200, 24: 200, 100: 10}.get(donors, 1)


def _published(zoo: Zoo, seed: int, value: float, seconds: float, cpu_seconds: float, restarts: int, plain: int) -> Row:
    """The better of both ways to draw centres, and the time of 200 restarts of the one that the text suggests."""
    ways = ("anywhere", "covering")
    found = {
        way: timed(lambda w=way: published.partition(zoo, seed, restarts, centres=w, reach=published.at_once))
        for way in ways
    }
    used = time.process_time()
    spent, _ = timed(lambda: published.partition(zoo, seed, plain))
    used = (time.process_time() - used) / plain * published.RESTARTS
    best = max(answer.objective for _, answer in found.values())
    whole = spent / plain * published.RESTARTS
    return {
        "baseline": f"published, best of {restarts} restarts of either kind",
        "baseline_objective": best,
        "ratio": value / best,
        "baseline_seconds": whole,
        "extrapolated_from": None if plain == published.RESTARTS else f"{plain} of {published.RESTARTS} restarts",
        "baseline_vectorised_seconds": found["anywhere"][0] / restarts * published.RESTARTS,
        "speedup": whole / seconds,
        "speedup_cpu": used / cpu_seconds,
        "baseline_doubled": found["anywhere"][1].doubled,
        "baseline_empty": found["anywhere"][1].empty,
    }


def _centred(zoo: Zoo, cuts: Array, seed: int) -> Row:
    """The objective with centres, optimised and of the partition found by pairs, and the other way round."""
    other, _ = equivalence_centres.search(zoo, STARTS, seed)
    best, mine = (equivalence_centres.medoids(zoo, one)[1] for one in (other, cuts))
    values = zoo.objective(np.stack([other, cuts]))
    return {
        "centres_of_pairs": mine / best,
        "pairs_of_centres": float(values[0] / values[1]),
        "cuts_that_differ": float((other != cuts).mean()),
    }


def _large(donors: int, seed: int) -> Row:
    """The sketched form alone."""
    made: Synthetic = synthetic(donors, seed, streaming.SKETCH)
    zoo = made.zoo(sketched=True)
    used = time.process_time()
    seconds, cuts = timed(lambda: equivalence_sketch.search(zoo, STARTS, seed))
    used = time.process_time() - used
    quantiles = equivalence_search.cut_numbers(zoo, equivalence_search.near_quantiles(zoo))
    values = zoo.objective(np.stack([cuts, quantiles]))
    return {
        "part": "partition",
        "what": f"{donors} donors, {made.cuts} cuts, seed {seed}, sketched alone",
        "donors": donors,
        "seed": seed,
        "form": "sketched",
        "objective": float(values[0]),
        "over_equal_shares": float(values[0] / values[1]),
        "seconds": seconds,
        "cpu_seconds": used,
        "valid": valid(zoo, cuts),
        "rows_mb": made.rows.nbytes / 1e6,
    }


def _memory(donors: int) -> Row:
    """The most that the sketched search allocates beside its rows, which is what must be linear in the cuts."""
    zoo = synthetic(donors, 0, streaming.SKETCH).zoo(sketched=True)
    if zoo.rows is None:
        raise ValueError("the sketched form has rows")
    tracemalloc.start()
    equivalence_sketch.search(zoo, STARTS, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "part": "partition",
        "what": f"memory of {donors} donors, {len(zoo.rows)} cuts, sketched",
        "donors": donors,
        "rows_bytes_per_cut": zoo.rows.nbytes / len(zoo.rows),
        "extra_mb": peak / 1e6,
        "extra_bytes_per_cut": peak / len(zoo.rows),
    }


def valid(zoo: Zoo, cuts: Array) -> bool:
    """Whether every block has a unit at least and meets its size bound."""
    for menu, row in zip(zoo.menus, cuts, strict=True):
        ends = np.array([0, *row, len(menu.width) - 1])
        if not menu.allows(ends[:-1], ends[1:]).all():
            return False
    return True
