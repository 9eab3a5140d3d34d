"""The paper's published networks rebuilt from recipes: parameters and multiply-accumulates against the paper's.

    python benchmarks/recipes.py [--quick] [--json result.json]

The authors give parameters exactly and "FLOPs" by mmcv's counter, which is rebuilt here: multiply-accumulates of
convolutions with their biases and of linear layers, and for every value one for a ReLU or a pooling and two for a
normalisation; the classifier, products of attention, other activations and additions do not count. derc counts
the multiply-accumulates of convolutions, linear layers and attention, the classifier's too.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import nn

from derc.artifacts import CutDonor
from derc.assembled import assemble, seeded
from derc.outcome import plan_graph
from derc.planning import plan
from derc.recipe import read_recipe
from derc.zoo import Zoo

FOLDER = Path(__file__).parent / "recipes"
PAPER = {
    "4_30_6": (24893616, 4.47),
    "4_50_10": (40414054, 6.43),
    "4_10_3": (7834434, 2.99),
    "4_90_20": (80661279, 13.29),
}
"""Parameters as the authors' configuration files give them, and their "FLOPs" in billions."""
QUICK = ("4_30_6", "4_50_10")
NORMS = (nn.BatchNorm2d, nn.LayerNorm)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
GATES = ("SEModule", "SqueezeExcite")
"""Squeeze-and-excitation of timm, which takes a mean where torchvision's, the authors', has a pooling module."""


def mmcv_count(network: nn.Module, head: nn.Module, images: torch.Tensor) -> Counter[str]:
    """What mmcv's counter counts in one forward pass, by kind of layer; `head` is pooled for, but left out."""
    counts: Counter[str] = Counter()

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        size = inputs[0].numel()
        if isinstance(module, nn.Conv2d):
            counts["convolutions"] += output.numel() * module.weight[0].numel()
            counts["biases of convolutions"] += output.numel() if module.bias is not None else 0
        elif isinstance(module, nn.Linear) and module is not head.linear:
            counts["linear layers"] += size * module.out_features
        elif isinstance(module, NORMS):
            counts["normalisations"] += 2 * size
        elif isinstance(module, ACTIVATIONS):
            counts["activations"] += output.numel()
        elif isinstance(module, POOLINGS) or type(module).__name__ in GATES or module is head:
            counts["poolings"] += size

    handles = [module.register_forward_hook(count) for module in network.modules()]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return counts


def rebuild(name: str) -> dict[str, Any]:
    """One published network: its figures beside the paper's."""
    start = time.perf_counter()
    recipe = read_recipe(FOLDER / f"dery_{name}.toml")
    made = plan(recipe, Zoo.load(str(recipe.zoo), check=lambda _: None))
    graph = plan_graph(made.assembly, {key: CutDonor(one.cuts, one.units) for key, one in made.lowered.items()})
    graph.verify()
    with seeded(0):
        network = assemble(made.assembly, made.lowered)
        images = torch.rand(1, *made.image)
    with torch.no_grad():
        logits = network(images)
    if logits.shape != (1, 1000) or not torch.isfinite(logits).all():
        raise SystemExit(f"{name}: the forward pass gives {tuple(logits.shape)}, or values that are not finite")
    params, (paper_params, paper_flops) = sum(p.numel() for p in network.parameters()), PAPER[name]
    head = network.parts[-1]
    counted = mmcv_count(network, head, images)
    products = counted["convolutions"] + counted["linear layers"] + head.linear.weight.numel()
    return {
        "network": f"DeRy({name.replace('_', ',')})",
        "assembly": str(made.assembly),
        "params": params,
        "plan_params": graph.params,
        "paper_params": paper_params,
        "macs_g": graph.macs / 1e9,
        "attention_g": (graph.macs - products) / 1e9,
        "classifier_g": head.linear.weight.numel() / 1e9,
        "mmcv_g": counted.total() / 1e9,
        "mmcv_parts_g": {kind: value / 1e9 for kind, value in counted.items()},
        "paper_flops_g": paper_flops,
        "seconds": time.perf_counter() - start,
    }


def figures(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of one network by name."""
    name = "dery_" + row["network"].removeprefix("DeRy(").removesuffix(")").replace(",", "_")
    return {
        f"{name}_params_m": row["params"] / 1e6,
        f"{name}_paper_params_m": row["paper_params"] / 1e6,
        f"{name}_params_difference": row["params"] - row["paper_params"],
        f"{name}_macs_g": row["macs_g"],
        f"{name}_mmcv_g": row["mmcv_g"],
        f"{name}_paper_macs_g": row["paper_flops_g"],
        f"{name}_macs_difference_g": row["macs_g"] - row["paper_flops_g"],
        f"{name}_mmcv_difference_g": row["mmcv_g"] - row["paper_flops_g"],
    }


def show(row: dict[str, Any]) -> None:
    """Print one network."""
    print(f"{row['network']}  {row['assembly']}")
    difference = row["params"] - row["paper_params"]
    print(f"  parameters  {row['params']:>12,}   paper {row['paper_params']:>12,}   difference {difference:+,}")
    print(f"  MACs        {row['macs_g']:>10.4f} G   paper {row['paper_flops_g']:>10.2f} G", end="")
    print(f"   difference {row['macs_g'] - row['paper_flops_g']:+.4f} G")
    print(f"  by mmcv     {row['mmcv_g']:>10.4f} G   paper {row['paper_flops_g']:>10.2f} G", end="")
    print(f"   difference {row['mmcv_g'] - row['paper_flops_g']:+.4f} G")
    parts = ", ".join(f"{kind} {value:.4f}" for kind, value in row["mmcv_parts_g"].items())
    print(f"    mmcv's: {parts}")
    print(f"    derc's besides: attention {row['attention_g']:.4f}, classifier {row['classifier_g']:.4f}")


@click.command()
@click.option("--quick", is_flag=True, help="Two of the four networks.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the result here.")
def main(quick: bool, output: Path | None) -> None:
    """Run the benchmark."""
    rows = []
    for name in QUICK if quick else PAPER:
        rows.append(rebuild(name))
        show(rows[-1])
    result = {
        "benchmark": "recipes",
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "protocol": "architectures alone, 224×224, batch 1; parameters and MACs are counted, nothing is timed",
        "rows": rows,
        "figures": {key: value for row in rows for key, value in figures(row).items()},
    }
    if output:
        output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
