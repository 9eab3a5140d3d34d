"""derc finetune on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Function = Callable[..., Any]

WHAT: tuple[Function, ...] = (
    click.option("--data", required=True, help="Labelled images: digits, folder:PATH, npz:PATH or hf:PATH."),
    click.option("--freeze", default="none", show_default=True, help="What stays: none, blocks or all-but-head."),
    click.option("--epochs", type=int, help="Times through the images.  [default: 10]"),
    click.option(
        "--teacher", default="none", show_default=True, help="donor (the last block's), none, or a donor's name."
    ),
    click.option(
        "--against",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="BUNDLE",
        help="Train this bundle's network too, and keep the better one; may be given again.",
    ),
    click.option("--zoo", help="Where the donors are, if the bundle's zoo is not where it was."),
    click.option(
        "--blockwise",
        type=int,
        default=0,
        show_default=True,
        help="Times through the images, without labels, in which each block learns from its donor, before the epochs.",
    ),
    click.option("--blockwise-blocks", default="", help="Numbers of these blocks.  [default: all behind a stitch]"),
    click.option("--blockwise-lr", type=float, help="Learning rate for these blocks.  [default: 0.01]"),
    click.option("--blockwise-jobs", type=int, default=0, help="Blocks that learn at once; 0: one for each thread."),
)
HOW: tuple[Function, ...] = (
    click.option("--lr", type=float, help="Learning rate.  [default: 0.001, 0.01 where something is frozen]"),
    click.option("--batch", type=int, help="Images a step.  [default: 64]"),
    click.option("--optimizer", help="One of timm's: adamw, sgd, lamb, …  [default: adamw]"),
    click.option("--schedule", help="cosine, poly, tanh or constant.  [default: cosine]"),
    click.option("--warmup", type=float, help="Share of the steps in which the rate rises.  [default: 0.1]"),
    click.option("--decay", type=float, help="Weight decay, which spares biases and norms.  [default: 0.05]"),
    click.option("--clip", type=float, help="Largest norm of the gradient, 0 for any.  [default: 1]"),
    click.option("--smoothing", type=float, help="Label smoothing.  [default: 0]"),
    click.option("--mixup", type=float, help="Beta's parameter, 0 for none.  [default: 0]"),
    click.option("--cutmix", type=float, help="Beta's parameter, 0 for none.  [default: 0]"),
    click.option("--ema", type=float, help="Decay of an average of the weights, such as 0.999.  [default: 0]"),
    click.option("--augment", help="Such as flip,crop=4,zoom=0.6,rand-m9-mstd0.5.  [default: none]"),
    click.option("--norms", help="Batch norms take batch statistics (train) or keep theirs (fixed).  [default: train]"),
    click.option("--teacher-share", type=float, help="The teacher's share of the loss.  [default: 0.5]"),
    click.option("--temperature", type=float, help="At which the teacher is softened.  [default: 2]"),
    click.option("--precision", help="fp32, bf16 or fp16; the latter by Accelerate.  [default: fp32]"),
    click.option("--device", help="auto, cpu, cuda, …  [default: auto]"),
    click.option("--seed", type=int, help="Seed of every random choice.  [default: 0]"),
    click.option("--workers", type=int, help="Processes that read images; 0: this one.  [default: 0]"),
    click.option("--limit-s", type=float, help="Seconds that training may take."),
    click.option("--allow-worse", is_flag=True, default=None, help="Keep trained weights even where they are worse."),
)
REST: tuple[Function, ...] = (
    click.option("--threads", type=int, default=0, help="Threads on a processor; 0: physical cores."),
    click.option("--measure-s", type=float, default=20.0, show_default=True, help="Longest time to measure."),
    click.option("--float32", is_flag=True, help="Build the engine in float32 where blocks were in a lower precision."),
    click.option("--tensorboard", type=click.Path(path_type=Path), help="Folder for TensorBoard's events."),
    click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the new bundle."),
    click.option("-q", "--quiet", is_flag=True, help="Errors only."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
)


def _options(command: Function) -> Function:
    for option in reversed((*WHAT, *HOW, *REST)):
        command = option(command)
    return command


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_options
def finetune(as_json: bool, quiet: bool, **flags: Any) -> None:
    """Train a bundle's network and write a new bundle of it; an interrupted training goes on where it was."""
    from derc.console import Console
    from derc.finetuned import result
    from derc.finetuning import Finetune, finetune_bundle
    from derc.summary import told
    from derc.training import TrainOptions
    from derc.training.freeze import RATES

    names = {"bundle", "data", "output", "freeze", "teacher", "zoo", "threads", "measure_s", "float32", "tensorboard"}
    names |= {"against", "blockwise", "blockwise_blocks", "blockwise_lr", "blockwise_jobs"}
    given = {name: value for name, value in flags.items() if name not in names and value is not None}
    given.setdefault("lr", RATES.get(flags["freeze"], TrainOptions.lr))
    asked = Finetune(**{name: flags[name] for name in names}, options=TrainOptions(**given))
    console = Console(quiet)
    console.listen()
    manifest = finetune_bundle(asked, console)
    if manifest is not None:
        click.echo(json.dumps(result(manifest)) if as_json else "\n".join(told(manifest)))
