"""A donor's card: how it was trained, by which command, and how accurate it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from derc.donor import Donor

DATA = "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI, CC BY 4.0), as scikit-learn ships it"
TEMPLATE = """# {name}

{task} by {factory} with {parameters:,} parameters, {accuracy:.2%} right on {images} held-out images.

- trained by `{command}` on {data}
- recipe: {recipe}
- normalisation: mean {mean}, std {std}; classes: {classes}
- licence {licence}; SHA-256 of the weights {sha256}
"""


def write_card(donor: Donor, out: Path, *, recipe: Mapping[str, Any], accuracy: float, images: int) -> None:
    """Write NAME.json beside the donor's weights in `out`."""
    weights = out / f"{donor.name}.safetensors"
    card = {
        "name": donor.name,
        "factory": donor.factory,
        "kwargs": dict(donor.kwargs),
        "task": recipe["task"],
        "classes": list(donor.labels or ()),
        "recipe": dict(recipe),
        "seed": recipe["seed"],
        "command": f"python -m derc.digits.train --only {donor.name}",
        "data": DATA,
        "mean": list(donor.mean),
        "std": list(donor.std),
        "parameters": parameters(weights),
        "heldout": {"accuracy": round(accuracy, 6), "images": images},
        "licence": donor.licence,
        "source": donor.source,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "trained_with": {"torch": version("torch"), "timm": version("timm")},
    }
    (out / f"{donor.name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def parameters(weights: Path) -> int:
    """Number of parameters in a safetensors file, running statistics left out."""
    with safe_open(weights, "pt") as file:
        names = [name for name in file.keys() if not name.rpartition(".")[2].startswith(("running_", "num_batches"))]  # noqa: SIM118
        return sum(file.get_tensor(name).numel() for name in names if file.get_tensor(name).is_floating_point())


def write_overview(out: Path, names: list[str]) -> None:
    """Write CARDS.md, for people, from the cards of `names`."""
    sections = []
    for name in names:
        card = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        settings = {key: value for key, value in card["recipe"].items() if key != "task" and value not in (0, None)}
        lines = ", ".join(f"{key} {value}" for key, value in settings.items())
        flat = card | card.pop("heldout") | {"recipe": lines, "classes": ", ".join(card["classes"])}
        sections.append(TEMPLATE.format(**flat))
    text = "<!-- Written by python -m derc.digits.train. -->\n\n" + "\n".join(sections)
    (out / "CARDS.md").write_text(text, encoding="utf-8")
