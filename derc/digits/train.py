"""Train the embedded zoo: ``python -m derc.digits.train [--only NAME] [--out DIR]``.

Recipes are judged by the validation split; held-out is read once per donor, for the accuracy on its card.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from derc.checkpoints import load_into
from derc.data import Split
from derc.digits import FOLDER, load_split
from derc.digits.cards import write_card, write_overview
from derc.digits.recipes import RECIPES, Recipe
from derc.donor import Donor
from derc.factories import make
from derc.images import resize
from derc.modules import Normalize
from derc.zoofile import read_toml

SIZE = (3, 32, 32)
TEMPERATURE = 2.0


@click.command()
@click.option("--only", type=click.Choice(list(RECIPES)), help="Train this donor alone.")
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, help="Where weights and cards go.")
def main(only: str | None, out: Path) -> None:
    """Train the donors of zoo.toml in the order of their recipes, on one thread, which makes it reproducible."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    donors = {donor.name: donor for donor in read_toml(FOLDER / "zoo.toml")}
    for name in [only] if only else list(RECIPES):
        donor, recipe = donors[name], RECIPES[name]
        teacher = _trained(donors[recipe.teacher], out) if recipe.teacher else None
        network = train(donor, recipe, teacher)
        save_file(network.state_dict(), out / f"{name}.safetensors")
        validation, _ = accuracy_on("validation", donor, network, recipe.task)
        click.echo(f"{name}: {validation:.2%} right on the validation split")
        accuracy, count = accuracy_on("heldout", donor, network, recipe.task)
        write_card(donor, out, recipe=asdict(recipe), accuracy=accuracy, images=count)
    write_overview(out, [name for name in donors if (out / f"{name}.json").is_file()])


def train(donor: Donor, recipe: Recipe, teacher: nn.Module | None) -> nn.Module:
    """The donor's network after its recipe, in eval mode."""
    torch.manual_seed(recipe.seed)
    network = make(donor.name, donor.factory, donor.kwargs, None)
    images, labels = examples(recipe.task, "train", recipe.images)
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.15)
    network.train()
    for _ in range(recipe.epochs):
        for chosen in torch.split(torch.randperm(len(images)), recipe.batch):
            loss = _loss(network, donor, augment(images[chosen], recipe), labels[chosen], recipe, teacher)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return network.eval()


def examples(task: str, split: str, part: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) in [0, 1] and the answers that `task` asks for; rotation gives each image four times."""
    pixels, digits = load_split(split)
    chosen = slice(*part) if part else slice(None)
    whole = Split(resize(pixels[chosen], SIZE), digits[chosen])
    images, labels = next(whole.batches(len(whole)))
    if labels is None:
        raise ValueError("the digits have labels")
    if task == "parity":
        return images, labels % 2
    if task == "rotation":
        turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
        return turned, torch.arange(4).repeat_interleave(len(images))
    return images, labels


@torch.no_grad()
def accuracy_on(split: str, donor: Donor, network: nn.Module, task: str) -> tuple[float, int]:
    """Share of right answers on `split`, and the number of images."""
    images, labels = examples(task, split)
    answers = torch.cat([network(part) for part in torch.split(normalised(donor)(images), 100)]).argmax(1)
    return float((answers == labels).double().mean()), len(labels)


def normalised(donor: Donor) -> Normalize:
    """The donor's own normalisation of images in [0, 1]."""
    return Normalize(donor.mean, donor.std)


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Move, turn, scale each image at random, within the recipe's limits, and add noise."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * math.radians(recipe.degrees)
    zoom = 1 + (torch.rand(n) * 2 - 1) * recipe.scale
    move = (torch.rand(n, 2) * 2 - 1) * 2 * recipe.shift
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    matrix = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved + recipe.noise * torch.randn_like(moved)).clamp(0, 1)


def _loss(
    network: nn.Module, donor: Donor, images: Tensor, labels: Tensor, recipe: Recipe, teacher: nn.Module | None
) -> Tensor:
    """Cross entropy (smoothed, mixed), or the divergence from the teacher where there is one."""
    x = normalised(donor)(images)
    if teacher is not None:
        with torch.no_grad():
            wanted = (teacher(images) / TEMPERATURE).softmax(1)
        return F.kl_div((network(x) / TEMPERATURE).log_softmax(1), wanted, reduction="batchmean") * TEMPERATURE**2
    if recipe.mixup == 0:
        return F.cross_entropy(network(x), labels, label_smoothing=recipe.smoothing)
    share = float(torch.distributions.Beta(recipe.mixup, recipe.mixup).sample())
    other = torch.randperm(len(x))
    output = network(share * x + (1 - share) * x[other])
    return share * F.cross_entropy(output, labels) + (1 - share) * F.cross_entropy(output, labels[other])


def _trained(donor: Donor, out: Path) -> nn.Module:
    """The teacher with the weights in `out`, taking images in [0, 1]."""
    network = make(donor.name, donor.factory, donor.kwargs, None)
    load_into(network, out / f"{donor.name}.safetensors")
    return nn.Sequential(normalised(donor), network).eval()


if __name__ == "__main__":
    main()
