"""The report page: every figure shows each datum once, no name can break out of it, nothing is fetched."""

from __future__ import annotations

import copy
import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from derc.report import render
from derc.report.axes import fit
from derc.report.palette import ink, shade
from derc.report.quantities import count, interval, milliseconds, percent, plain, seconds

VOID = {"meta", "br", "link", "img", "hr", "input"}
IMPLIED = {"th"}
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
