"""Recipes over small untrained donors, written as a user would."""

from __future__ import annotations

import json
from pathlib import Path

from tests.networks import FAMILIES

STITCHED = """
zoo = "zoo.toml"

[stem]
kind = "conv7x7"
channels = 64

[[block]]
donor = "resnet"
first = "layer1.0"
last = "layer1.1"

[[block]]
donor = "swin"
first = "layers.1.blocks.0"
last = "layers.1.blocks.0"
stitch = "dery"

[[block]]
donor = "swin"
first = "layers.1.blocks.1"
last = "layers.1.blocks.1"
stitch = "dery-fc"

[[block]]
donor = "resnet"
first = "layer2.1"
last = "layer3.0"
stitch = "dery"
stride = 2

[[block]]
donor = "resnet"
first = "layer4.1"
last = "layer4.1"
stitch = "dery"
grid = "keep"

[head]
kind = "linear"
classes = 5
"""
"""Every kind of part that a recipe may add, except the linear stitch."""

PLAIN = """
zoo = "zoo.toml"

[[block]]
donor = "resnet"
first = "layer1"
last = "layer2.0"

[[block]]
donor = "vit"
first = "blocks.2"
last = "blocks.3"
"""
"""Donors' own stem and head, and a linear stitch."""


def write_zoo(folder: Path, *families: str) -> Path:
    """A zoo file of untrained donors for 32×32 images and ten classes."""
    tables = []
    for family in families:
        name, options = FAMILIES[family]
        kwargs = {"num_classes": 10, **options}
        pairs = ", ".join(f"{key} = {json.dumps(value)}" for key, value in kwargs.items())
        tables.append(
            f'[[donor]]\nname = "{family}"\nfactory = "timm:{name}"\nkwargs = {{ {pairs} }}\n'
            "input_size = [3, 32, 32]\nmean = [0.5, 0.4, 0.3]\nstd = [0.5, 0.6, 0.7]\nlabels = 10\n"
        )
    path = folder / "zoo.toml"
    path.write_text("\n".join(tables))
    return path


def write_recipe(folder: Path, text: str, *families: str) -> Path:
    """A recipe file beside a zoo of `families` (resnet, swin and vit where none are named)."""
    write_zoo(folder, *(families or ("resnet", "swin", "vit")))
    path = folder / "recipe.toml"
    path.write_text(text)
    return path
