"""Donors and images of the accuracy benchmark: public CIFAR-10 networks, three trained here, and disjoint splits.

Of `x_train`, the first 512 images show the donors' values to the analysis, the next 4,000 train the benchmark's own
donors (the last tenth of these chooses their state), and every seed draws its probe images from the 5,488 that are
left. Held out are the first images of `x_test`. Training and validation images are drawn from the others of `x_test`,
for the public donors were trained on what `x_train` was made from, as on no user's images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import cifarzoo
from derc.artifacts import Array
from derc.data import Data, Split
from derc.donor import Donor
from derc.modules import Normalize
from derc.training import TrainOptions, train
from derc.zoo import Zoo

ANALYSIS, OWN = 512, 4000
"""Images of `x_train` that show the donors' values to the analysis, and that train the benchmark's own donors."""
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


@dataclass(frozen=True)
class Size:
    """How much of everything: numbers of images, `evaluations` of a search, networks that are `matched`, epochs.

    derc's search has donors in `blocks`, the paper's in `paper_blocks`, as many as the paper has. `grid` has pairs of
    a rate and what norms do, of which validation images choose; the rate is `frozen_lr` with frozen blocks, and
    `distilled_lr` with a teacher.
    """

    donors: tuple[str, ...]
    probe: int = 512
    train: int = 2000
    validation: int = 1000
    heldout: int = 2000
    evaluations: int = 24
    matched: int = 2
    swaps: int = 24
    own_epochs: int = 10
    profile_s: float | None = None
    epochs: int = 1
    blocks: int = 4
    paper_blocks: int = 4
    grid: tuple[tuple[float, str], ...] = ((1e-4, "fixed"), (3e-4, "fixed"), (1e-3, "train"))
    frozen_lr: float = 1e-2
    distilled_lr: float = 1e-4

    @property
    def name(self) -> str:
        """A name for the folder of what was computed, another one for another size."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


PUBLIC = {
    "akamaster_resnet20": "residual network",
    "akamaster_resnet32": "residual network",
    "vainf_resnet56_pruned": "residual network",
    "mlperftiny_resnet8": "residual network",
    "mlperftiny_resnet8_large": "residual network",
    "ai85_nascifarnet": "plain convolutions, no norms",
    "tiniest": "gated depthwise blocks, layer norm",
}
"""Networks of other authors and their families; a network that cannot be exported is left out."""


@dataclass(frozen=True)
class Recipe:
    """A network that the benchmark trains itself."""

    family: str
    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


RECIPES = {
    "own_mobilenet": Recipe(
        "inverted residuals",
        "torchvision:mobilenet_v2",
        {
            "num_classes": 10,
            "inverted_residual_setting": [[1, 16, 1, 1], [4, 24, 2, 1], [4, 32, 2, 2], [4, 64, 1, 2]],
        },
    ),
    "own_vit": Recipe(
        "vision transformer",
        "timm:vit_tiny_patch16_224",
        {"num_classes": 10, "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2},
    ),
    "own_mixer": Recipe(
        "token mixer",
        "timm.models.mlp_mixer:MlpMixer",
        {"num_classes": 10, "img_size": 32, "patch_size": 4, "embed_dim": 64, "num_blocks": 4},
    ),
}
FAMILIES = PUBLIC | {name: recipe.family for name, recipe in RECIPES.items()}
UNSEEN = ((3e-5, "fixed"), (3e-4, "fixed"), (1e-3, "train"))
"""The grid for images that the public donors were not trained on."""
FULL = Size(tuple(FAMILIES), epochs=3, blocks=16, profile_s=150.0, grid=UNSEEN, frozen_lr=3e-3, distilled_lr=3e-5)
QUICK = Size(
    ("akamaster_resnet20", "mlperftiny_resnet8", "own_mobilenet", "own_vit"),
    probe=128,
    train=640,
    validation=400,
    heldout=500,
    evaluations=4,
    matched=1,
    swaps=6,
    own_epochs=2,
    profile_s=12.0,
    blocks=8,
    grid=UNSEEN,
    frozen_lr=3e-3,
    distilled_lr=3e-5,
)


@dataclass(frozen=True)
class Images:
    """All images of the shared folder, uint8 (N, 32, 32, 3), and their labels."""

    train: Split
    test: Split

    @classmethod
    def load(cls, folder: Path) -> Images:
        with np.load(folder / "data" / "cifar10.npz", allow_pickle=False) as arrays:
            parts = [(arrays[f"x_{name}"], arrays[f"y_{name}"].astype(np.int64).ravel()) for name in ("train", "test")]
        return cls(*(Split(x, y) for x, y in parts))

    def analysis(self, size: Size) -> Data:
        """Images for the analysis and the latencies, which are made once; nothing is chosen on them."""
        probe, own = self.train.first(min(ANALYSIS, size.probe)), _part(self.train, np.arange(ANALYSIS, ANALYSIS + 100))
        return Data("analysis", cifarzoo.CLASSES, probe, own, own)

    def own(self) -> tuple[Split, Split]:
        """Training and validation images of the benchmark's own donors."""
        order, last = np.arange(ANALYSIS, ANALYSIS + OWN), OWN - OWN // 10
        return _part(self.train, order[:last]), _part(self.train, order[last:])

    def drawn(self, size: Size, seed: int) -> Data:
        """A seed's splits of the images of `x_train` that train no donor here, held out those of `x_test`.

        `training(n)` gives the probes and then training images, which `more` gives alone.
        """
        order = ANALYSIS + OWN + np.random.default_rng(seed).permutation(len(self.train) - ANALYSIS - OWN)
        probe, train, validation = _dealt(self.train, order, size.probe, size.train, size.validation)
        return Data(f"seed{seed}", cifarzoo.CLASSES, probe, validation, self.test.first(size.heldout), train.first)

    def unseen(self, size: Size, seed: int) -> Data:
        """As `drawn`, but training and validation images are of `x_test`, behind those that are held out."""
        order = size.heldout + np.random.default_rng(seed).permutation(len(self.test) - size.heldout)
        validation, train = _dealt(self.test, order, size.validation, size.train)
        return replace(self.drawn(size, seed), validation=validation, more=train.first)


def _part(split: Split, numbers: Array) -> Split:
    return Split(split.images[numbers], None if split.labels is None else split.labels[numbers])


def _dealt(split: Split, order: Array, *counts: int) -> list[Split]:
    """Splits of so many images each, one after another in this order."""
    ends = np.cumsum(counts)
    return [_part(split, part) for part in np.split(order[: ends[-1]], ends[:-1])]


def load_zoo(shared: Path, work: Path, size: Size, images: Images) -> Zoo:
    """The donors that `size` names; those of the benchmark are trained first where `work` does not have them."""
    (work / "donors").mkdir(parents=True, exist_ok=True)
    public = cifarzoo.load_zoo(shared / "zoo", work / "donors")
    named = [(name, RECIPES[name]) for name in size.donors if name in RECIPES]
    own = [own_donor(name, recipe, work / "donors", size.own_epochs, images.own()) for name, recipe in named]
    return Zoo("accuracy", (*(one for one in public.donors if one.name in size.donors), *own))


def own_donor(
    name: str,
    recipe: Recipe,
    folder: Path,
    epochs: int,
    images: tuple[Split, Split],
    classes: tuple[str, ...] = cifarzoo.CLASSES,
) -> Donor:
    """A network of the benchmark with its weights, trained on the first of two splits if `folder` does not have it."""
    path = folder / f"{name}-{epochs}.safetensors"
    kwargs = {**recipe.kwargs, "num_classes": len(classes)}
    donor = Donor(name, recipe.factory, kwargs, mean=MEAN, std=STD, labels=classes, licence="Apache-2.0")
    if not path.is_file():
        network = nn.Sequential(Normalize(MEAN, STD), donor.build()).to(memory_format=torch.channels_last)
        options = TrainOptions(epochs=epochs, batch=32, lr=2e-3, augment="flip,crop=4", allow_worse=True)
        train(network, *images, options)
        state = {key: value.contiguous() for key, value in network[1].state_dict().items()}
        save_file(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return Donor(**{**donor.__dict__, "weights": path})
