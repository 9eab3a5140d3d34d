"""The report page: every figure shows each datum once, no name can break out of it, nothing is fetched."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from derc.report import palette, quantities, render
from derc.report.axes import fit
from derc.report.labels import Box, place

VOID = {"meta", "br"}
DONORS = {
    "resnet18_digits": ("timm:resnet18", 9, 1.21, 0.962, True),
    "regnety_small": ("timm:regnety_002", 8, 0.94, 0.957, True),
    "mobilenetv3": ("timm:mobilenetv3_small_050", 10, 0.42, 0.911, True),
    "efficientnet_tiny": ("timm:efficientnet_b0", 9, 1.62, 0.968, True),
    "convnext_atto": ("timm:convnext_atto", 7, 0.88, 0.949, True),
    "vit_tiny_rotation": ("timm:vit_tiny_patch16_224", 7, 0.71, None, False),
    "swin_mini": ("timm:swin_tiny_patch4_window7_224", 6, 1.95, 0.973, True),
    "vit_oddeven": ("timm:vit_tiny_patch16_224", 6, 0.72, None, False),
}


def sample() -> dict[str, Any]:
    """A manifest as a compile of eight donors writes it."""
    rng = random.Random(7)
    donors = {name: _donor(name, rng) for name in DONORS}
    partition = {name: _blocks(len(donor["cuts"]) - 1, donor["macs"], rng) for name, donor in donors.items()}
    candidates = _candidates(partition, donors, rng)
    chosen = [("mobilenetv3", 0), ("regnety_small", 1), ("regnety_small", 2), ("swin_mini", 3)]
    blocks = [{"donor": d, "params": 61_000 + 9_000 * k, **partition[d][k]} for d, k in chosen]
    return {
        "schema": 1,
        "derc": "0.1.0",
        "created": "2025-11-23T22:05:11Z",
        "status": "ok",
        "command": "derc compile --zoo digits --data digits --target cpu --latency-ms 1.0 -o out/demo",
        "target": {
            "name": "cpu",
            "engine": {"onnxruntime": "1.32.0", "cpu": "AMD EPYC 7R13", "threads": "2"},
            "batch": 1,
        },
        "budget": {"latency_ms": 1.0, "params_m": 0.5, "macs_g": None, "memory_mb": None},
        "selected": {
            "assembly": " | ".join(f"{b['donor']}[{b['first']}:{b['last']}]" for b in blocks),
            "intact": False,
            "blocks": blocks,
            "stitches": [_stitch(1, "NCHW24x8x8", "NCHW56x8x8"), _stitch(3, "NCHW152x4x4", "NHWC192x4x4")],
            "params": 412_330,
            "macs": 18_400_000,
            "memory_mb": 3.72,
        },
        "latency": {
            "predicted_ms": 0.887,
            "measured_ms": 0.913,
            "ci95_ms": [0.908, 0.919],
            "provenance": "measured",
            "stable": True,
            "samples": 1840,
            "noise": 0.0041,
        },
        "accuracy": {
            "validation": 0.9639,
            "heldout": 0.9611,
            "random_stitch_heldout": 0.1083,
            "donors": {n: {"validation": d[3], "heldout": d[3] and d[3] - 0.004} for n, d in DONORS.items()},
            "best_intact_within_budget": {"donor": "regnety_small", "heldout": 0.953, "measured_ms": 0.941},
        },
        "solver": {
            "name": "highs",
            "status": "optimal",
            "objective": -3.41822,
            "bound": -3.41822,
            "gap": 0.0,
            "evaluations": 24,
        },
        "donors": donors,
        "candidates": candidates,
        "partition": partition,
        "similarity": _similarity(donors, rng),
        "parity": {"module_onnx": 2.1e-6, "onnx_engine": 0.0, "module_engine": 2.1e-6, "tolerance": 1e-4},
        "timings_s": {
            "lower": 4.1,
            "cut": 0.31,
            "embed": 6.4,
            "partition": 2.2,
            "profile": 61.0,
            "select": 0.9,
            "stitch": 5.2,
            "score": 11.8,
            "emit": 3.3,
            "package": 9.6,
        },
        "files": {
            name: f"{rng.getrandbits(256):064x}"
            for name in (
                "model.py",
                "weights.safetensors",
                "model.onnx",
                "engine/model.ort",
                "plan.txt",
                "reproduce.sh",
            )
        },
    }


def _donor(name: str, rng: random.Random) -> dict[str, Any]:
    factory, units, ms, _, task = DONORS[name]
    return {
        "factory": factory,
        "source": "derc digits zoo",
        "licence": "Apache-2.0",
        "sha256": f"{rng.getrandbits(256):064x}",
        "params": rng.randrange(150_000, 900_000),
        "macs": rng.randrange(4_000_000, 60_000_000),
        "cuts": ["input", *(f"stages.{k}" for k in range(units - 1)), "output"],
        "task": task,
        "latency": {"ms": ms, "low_ms": ms * 0.995, "high_ms": ms * 1.006, "provenance": "measured", "stable": True},
    }


def _blocks(units: int, macs: int, rng: random.Random) -> list[dict[str, Any]]:
    ends = [0, *sorted(rng.sample(range(1, units), 3)), units]
    shares = [rng.uniform(0.5, 1.5) for _ in range(4)]
    spans = zip(ends, ends[1:], shares, strict=False)
    return [
        {"first": first, "last": last, "set": k, "macs": round(macs * share / sum(shares))}
        for k, (first, last, share) in enumerate(spans)
    ]


def _candidates(partition: dict[str, Any], donors: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
    found = []
    for number in range(24):
        picks = [rng.choice(list(partition)) for _ in range(4)]
        names = [f"{d}[{partition[d][k]['first']}:{partition[d][k]['last']}]" for k, d in enumerate(picks)]
        predicted = rng.uniform(0.6, 1.02)
        found.append(
            {
                "assembly": " | ".join(names),
                "intact": False,
                "chosen": number == 3,
                "validation": rng.uniform(0.88, 0.955) if number != 3 else 0.9639,
                "agreement": rng.uniform(0.8, 0.95),
                "naswot": rng.uniform(300, 420),
                "predicted_ms": predicted if number != 3 else 0.887,
                "measured_ms": None if number % 3 == 1 else 0.913 if number == 3 else predicted * rng.gauss(1.02, 0.04),
            }
        )
    found[5] |= {"predicted_ms": None, "measured_ms": None}
    found[7] |= {"assembly": "regnety_small[0:7]", "intact": True, "measured_ms": 0.941, "predicted_ms": 0.95}
    return found


def _similarity(donors: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    index = [[name, cut] for name, donor in donors.items() for cut in range(len(donor["cuts"]))]
    depth = [cut / (len(donors[name]["cuts"]) - 1) for name, cut in index]
    values = [
        [
            1.0 if a == b else round(0.95 * math.exp(-2.2 * abs(depth[a] - depth[b])) * rng.uniform(0.8, 1), 4)
            for b in range(len(index))
        ]
        for a in range(len(index))
    ]
    return {"estimator": "linear CKA, debiased", "images": 256, "index": index, "values": values}


def _stitch(before: int, source: str, target: str) -> dict[str, Any]:
    return {"before": before, "source": source, "target": target, "params": 8_512, "macs": 540_672, "residual": 0.213}


def small() -> dict[str, Any]:
    """The sample with a matrix of six cuts, quick to render."""
    manifest = sample()
    matrix = manifest["similarity"]
    matrix |= {"index": matrix["index"][:6], "values": [row[:6] for row in matrix["values"][:6]]}
    return manifest


class Page(HTMLParser):
    """Parses a page strictly: every element that is opened is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append((tag, {name: value or "" for name, value in attrs}))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inside = tuple(word for _, own in self.open for word in (own.get("id", ""), *own.get("class", "").split()))
        self.elements.append((tag, {name: value or "" for name, value in attrs}, inside))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1][0] != "style":
            self.text.append(data)

    def marks(self, word: str, inside: str) -> int:
        """Number of elements of class `word` within the element of class or id `inside`."""
        return sum(word in attrs.get("class", "").split() and inside in where for _, attrs, where in self.elements)

    def tags(self, tag: str, inside: str) -> int:
        return sum(name == tag and inside in where for name, _, where in self.elements)


def plain_text(manifest: dict[str, Any]) -> str:
    return " ".join(" ".join(Page(render(manifest)).text).replace(quantities.THIN, " ").split())


def test_sections_come_in_order_and_elements_are_balanced() -> None:
    page = Page(render(sample()))
    sections = [attrs["id"] for tag, attrs, _ in page.elements if tag in {"header", "section"}]
    assert sections == [
        "headline",
        "assembly",
        "tradeoff",
        "calibration",
        "partition",
        "similarity",
        "donors",
        "solver",
        "parity",
        "timings",
        "files",
        "provenance",
    ]


def test_page_fetches_and_runs_nothing() -> None:
    page = Page(render(sample()))
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}
    assert not [attrs for _, attrs, _ in page.elements if loading & set(attrs)]
    assert not {tag for tag, *_ in page.elements} & {"script", "link", "img", "iframe", "object", "image", "use"}
    html = render(sample())
    assert "@import" not in html and "http" not in html
    assert html.count("url(") == html.count("url(#")


def test_each_figure_has_one_mark_for_each_datum() -> None:
    manifest = sample()
    page = Page(render(manifest))
    shown = [c for c in manifest["candidates"] if c["measured_ms"] or c["predicted_ms"]]
    pairs = [c for c in manifest["candidates"] if c["measured_ms"] and c["predicted_ms"]]
    tasks = [d for d in manifest["accuracy"]["donors"].values() if d["validation"] is not None]
    side = len(manifest["similarity"]["index"])
    assert page.marks("block", "strip") == len(manifest["selected"]["blocks"])
    assert page.marks("stitch", "strip") == len(manifest["selected"]["stitches"])
    assert page.marks("mark", "tradeoff") - page.marks("mark", "legend") == len(shown) + len(tasks)
    assert page.marks("hollow", "tradeoff") - 1 == sum(c["measured_ms"] is None for c in shown)
    assert page.marks("mark", "calibration") == len(pairs)
    assert page.tags("tr", "pairs") - 1 == len(pairs)
    assert page.marks("seg", "bars") == sum(map(len, manifest["partition"].values()))
    assert page.marks("taken", "bars") == 4
    assert page.tags("rect", "heat") == side**2
    assert page.tags("tr", "donors") - 2 == len(manifest["donors"]) - 1
    assert page.marks("meter", "timings") == len(manifest["timings_s"])


def test_marks_lie_where_their_values_are() -> None:
    axis = fit([0.5, 2.0], 100, 400)
    assert axis.at(1.0) - axis.at(0.5) == pytest.approx(axis.at(1.5) - axis.at(1.0), abs=0.2)
    decades = fit([0.1, 100.0], 0, 300)
    assert decades.log
    assert decades.at(1.0) - decades.at(0.1) == pytest.approx(decades.at(100.0) - decades.at(10.0), abs=0.2)


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [0.2, 9.0], [0.01, 300.0], [1e-6, 2e-6], [0.97, 0.9701]])
def test_an_axis_holds_its_values_and_four_or_more_round_ticks(values: list[float]) -> None:
    axis = fit(values, 0, 100)
    assert all(0 <= axis.at(value) <= 100 for value in values)
    assert 3 <= len(axis.ticks) <= 16
    assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in axis.ticks)


def test_labels_avoid_points_and_one_another() -> None:
    points = [(50.0, 50.0), (75.0, 50.0)]
    first, second = place([(*point, "label") for point in points], points, Box(0, 0, 200, 100))
    assert first and second and first.anchor == "end" and second.anchor == "start"
    assert place([(5.0, 5.0, "a label too long for its frame")], [(5.0, 5.0)], Box(0, 0, 20, 20)) == [None]


def test_hostile_names_stay_text() -> None:
    evil = "</title><script>alert(1)</script>\"'><img src=x onerror=y>{{ 7 * 7 }}"
    manifest = small()
    manifest["donors"] = {evil: manifest["donors"]["swin_mini"]}
    manifest["accuracy"]["donors"] = {evil: {"validation": 0.9, "heldout": 0.9}}
    manifest["partition"] = {evil: manifest["partition"]["swin_mini"]}
    manifest["similarity"] |= {"index": [[evil, 0]], "values": [[1.0]]}
    manifest["selected"] |= {"assembly": evil, "blocks": [manifest["selected"]["blocks"][0] | {"donor": evil}]}
    manifest["files"] = {evil: evil}
    page = Page(render(manifest))
    assert not {"script", "img"} & {tag for tag, *_ in page.elements}
    assert not [attrs for _, attrs, _ in page.elements if "onerror" in attrs]
    assert evil in "".join(page.text)


def nullified(tree: Any) -> Any:
    """The same shape with every leaf null."""
    if isinstance(tree, dict):
        return {key: nullified(value) for key, value in tree.items()}
    return [nullified(value) for value in tree] if isinstance(tree, list) and isinstance(tree[0], dict) else None


@pytest.mark.parametrize("key", list(small()))
@pytest.mark.parametrize("how", ["absent", "null", "leaves"])
def test_any_part_may_be_missing(key: str, how: str) -> None:
    manifest = small()
    value = manifest.pop(key)
    if how != "absent":
        manifest[key] = None if how == "null" else nullified(value)
    text = plain_text(manifest)
    assert not [word for word in ("None", "nan", "Undefined") if word in text.split()]


def test_an_empty_manifest_is_a_page_of_dashes() -> None:
    text = plain_text({})
    assert "No network chosen Nothing was built" in text and text.count(quantities.DASH) > 20
    assert not Page(render({})).tags("rect", "similarity")


def test_a_zoo_of_one_donor_without_labels_or_budget() -> None:
    manifest = small()
    blocks = [{"donor": "only", "first": 0, "last": 6, "set": 0, "params": 5, "macs": 5}]
    candidate = manifest["candidates"][0] | {"validation": None, "agreement": 1.0, "chosen": True, "intact": True}
    manifest |= {"accuracy": None, "budget": None, "candidates": [candidate], "partition": {"only": blocks}}
    manifest |= {"donors": {"only": manifest["donors"]["swin_mini"]}, "similarity": None}
    manifest["selected"] = {"assembly": "only[0:6]", "intact": True, "blocks": blocks, "stitches": []}
    page = Page(render(manifest))
    assert page.marks("mark", "tradeoff") - page.marks("mark", "legend") == 1
    assert "only, intact" in plain_text(manifest) and "agreement with the task donors" in plain_text(manifest)
    assert "Built without a budget" in plain_text(manifest)


@pytest.mark.parametrize(
    ("change", "claim", "tone"),
    [
        ({}, "Within budget", "good"),
        ({"measured_ms": 1.2}, "Over the latency budget", "bad"),
        ({"stable": False}, "Within budget, but the measurement did not settle", "open"),
        ({"measured_ms": None}, "Latency budget not proved: predicted, not measured", "open"),
        ({"provenance": "recorded"}, "Latency budget not proved: recorded, not measured", "open"),
        ({"measured_ms": None, "predicted_ms": None}, "Built; its latency is not known", "open"),
    ],
)
def test_only_a_measured_latency_meets_the_budget(change: dict[str, Any], claim: str, tone: str) -> None:
    manifest = small()
    manifest["latency"] |= change
    assert f'<span class="badge {tone}">{claim}</span>' in render(manifest)


def test_headline_names_the_gain_and_other_budgets() -> None:
    assert "+0.8 points against the best intact donor within the budget (regnety_small: 95.3 %" in plain_text(small())
    manifest = small()
    manifest["selected"]["params"] = 600_000
    assert "Over the parameters budget" in plain_text(manifest)
    manifest["status"], manifest["selected"]["params"] = "over_budget", 1
    assert "Over budget" in plain_text(manifest)


def test_parity_beyond_tolerance_is_said() -> None:
    manifest = small()
    assert plain_text(manifest).count("within tolerance") == 3
    manifest["parity"]["onnx_engine"] = 0.5
    assert plain_text(manifest).count("beyond tolerance") == 1


def test_a_lower_precision_is_shown() -> None:
    manifest = small()
    manifest["selected"]["blocks"][0]["precision"] = "int8"
    manifest["parity"] |= {"relative": True, "agreement": 0.98, "least_agreement": 0.85, "onnx_engine": None}
    page = plain_text(manifest)
    assert page.count("· int8") == 1 and "Relative difference" in page
    assert "alike" in page and page.count("within tolerance") == 2
    manifest["selected"] |= {"stitches": [], "blocks": [manifest["selected"]["blocks"][0]]}
    assert f"{manifest['selected']['blocks'][0]['donor']} in int8" in plain_text(manifest)


def test_a_large_matrix_has_its_cells_but_no_tooltips() -> None:
    manifest = small()
    manifest["similarity"] |= {"index": [["swin_mini", cut] for cut in range(130)], "values": [[0.5] * 130] * 130}
    page = Page(render(manifest))
    assert page.tags("rect", "heat") == 130**2
    assert page.tags("title", "cells") == 0


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (quantities.plain(0.0004567), "0.000457"),
        (quantities.plain(-3.14159, 4), "−3.142"),
        (quantities.plain(9.996), "10.0"),
        (quantities.plain(2.1e-6), "2.10e-06"),
        (quantities.plain(float("nan")), "–"),
        (quantities.count(999_700), "1.00 M"),
        (quantities.count(11_689_512), "11.7 M"),
        (quantities.count(512), "512"),
        (quantities.whole(18_400), "18 400"),
        (quantities.milliseconds(0.0042), "4.20 µs"),
        (quantities.milliseconds(12_345), "12.3 s"),
        (quantities.interval([0.98, 1.02]), "0.980 to 1.02 ms"),
        (quantities.interval([None, 1.0]), "–"),
        (quantities.seconds(0.042), "42 ms"),
        (quantities.seconds(125.4), "2 min 05 s"),
        (quantities.percent(0.9611), "96.1 %"),
        (quantities.percent(True), "–"),
        (quantities.ratio(1.0049), "1.00 ×"),
    ],
)
def test_numbers_read_well(shown: str, text: str) -> None:
    assert shown.replace(quantities.THIN, " ") == text


def test_colours_are_distinct_and_legible() -> None:
    assert len(set(map(palette.of_set, range(8)))) == 8
    assert palette.ink("#f0e442") == "#000" and palette.ink("#440154") == "#fff"
    assert palette.shade(0.0) == palette.RAMP[0] and palette.shade(1.7) == palette.RAMP[-1]


def test_the_report_imports_no_torch() -> None:
    code = "import sys, derc.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
