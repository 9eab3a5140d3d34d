"""derc finetune --blockwise: a bundle's blocks learn from its donors, in one process or two, killed or not."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from derc import bundle
from derc.cli import cli
from derc.console import Console
from derc.digits import load_split
from derc.errors import UsageError
from derc.finetuning import Finetune, finetune_bundle
from derc.images import resize
from derc.training import TrainOptions
from derc.zoo import Zoo
from tests.commands import command
from tests.conftest import small_zoo
from tests.test_finetune import moved, resealed, right

RECIPE = """
zoo = "zoo.toml"

[[block]]
donor = "resnet-slim"
first = "layer1"
last = "layer1"

[[block]]
donor = "convnext"
first = "stages.1"
last = "stages.1"

[[block]]
donor = "resnet-slim"
first = "layer3"
last = "layer4"
"""
NONE = TrainOptions(epochs=0, batch=50)
PARENTS = {"stitch1", "block1", "stitch2", "block2"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A bundle of three blocks with random stitches between them, of which the middle leaves most of its donor out."""
    folder = tmp_path_factory.mktemp("parent")
    small_zoo(folder, "resnet-slim", "convnext")
    (folder / "recipe.toml").write_text(RECIPE)
    words = ["assemble", str(folder / "recipe.toml"), "--profile-s", "1", "-o", str(folder / "out")]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "out"


def tune(folder, output, said=None, **kwargs):
    console = Console(quiet=True)
    console.say = [].append if said is None else said.append
    asked = Finetune(folder, "digits", output, options=NONE, threads=2, measure_s=0.2, blockwise=1)
    return finetune_bundle(replace(asked, **kwargs), console)


@pytest.fixture(scope="module")
def taught(parent, tmp_path_factory):
    """(bundle, manifest, what was said) of that network after one pass, both blocks at once."""
    output, said = tmp_path_factory.mktemp("taught") / "new", []
    return output, tune(parent, output, said), said


def missed(folder) -> dict[str, float]:
    """What each block of a bundle misses, by hooks on the donors as timm builds them."""
    images, _ = load_split("validation")
    x = torch.from_numpy(resize(images, (3, 32, 32)).transpose(0, 3, 1, 2).copy()).float() / 255
    zoo, seen = Zoo.load(str(folder.parent / "zoo.toml") if (folder.parent / "zoo.toml").exists() else "digits"), {}
    for name, path in (("resnet-slim", "layer1"), ("convnext", "stages.1")):
        donor, module = zoo[name], zoo[name].build()
        module.get_submodule(path).register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: y}))
        with torch.no_grad():
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (donor.mean, donor.std))
            seen[f"{name} out"] = module((x - mean) / std)
    network = bundle.load(folder)
    with torch.no_grad():
        first = network.block1(network.stitch1(seen["resnet-slim"].clone()))
        second = network.block2(network.stitch2(seen["convnext"].clone()))
    pairs = {"block1": (first, seen["convnext"]), "block2": (second, seen["resnet-slim out"])}
    return {
        name: float((got - want).double().square().sum() / (want - want.double().mean(0)).square().sum())
        for name, (got, want) in pairs.items()
    }


def test_each_block_learns_what_its_intact_donor_gives(parent, taught):
    output, manifest, said = taught
    record = manifest["finetune"]["blockwise"]
    before, after = missed(parent), missed(output)
    assert [block["block"] for block in record["blocks"]] == ["block1", "block2"]
    for block in record["blocks"]:
        assert block["loss"]["before"] == pytest.approx(before[block["block"]], rel=1e-3)
        assert block["loss"]["after"] < 0.7 * block["loss"]["before"] and block["kept"]
    assert record["blocks"][0]["loss"]["after"] == pytest.approx(after["block1"], rel=1e-3)
    assert record["images"] == 2 * 1200 and record["jobs"] == 2 and record["threads"] == 1
    assert {name.split(".")[0] for name in moved(parent, output)} == PARENTS
    assert sum("pass 1/1" in line for line in said) == 2


def test_the_network_is_better_and_bundle_console_and_page_tell(parent, taught):
    output, manifest, said = taught
    record = manifest["finetune"]
    assert bundle.verify(output)["seal"] == manifest["seal"] and record["kept"] == "blocks" and record["log"] == []
    assert right(bundle.load(parent)) == record["accuracy"]["heldout"]["before"]
    assert right(bundle.load(output)) == record["accuracy"]["heldout"]["after"] == manifest["accuracy"]["heldout"]
    assert record["accuracy"]["validation"] == record["blockwise"]["validation"]
    assert manifest["accuracy"]["heldout"] > record["accuracy"]["heldout"]["before"] + 0.2
    rows = list(csv.DictReader((output / "blockwise.csv").open()))
    assert [(row["block"], row["pass"]) for row in rows] == [("block1", "1"), ("block2", "1")]
    assert float(rows[0]["validation_loss"]) == record["blockwise"]["log"][0]["validation_loss"]
    page = (output / "report.html").read_text()
    assert "Block by block" in page and "The weights that donors taught the blocks." in page
    assert any(line.startswith("block1 misses of what convnext[") for line in said)
    assert said[-1].startswith("block by block: validation") or any("block by block: validation" in s for s in said)
    assert "--blockwise 1" in (output / "reproduce.sh").read_text()


def test_one_process_gives_the_same_weights_and_epochs_go_on_from_them(parent, taught, tmp_path):
    output, _, _ = taught
    manifest = tune(parent, tmp_path / "one", blockwise_jobs=1, options=replace(NONE, epochs=1, lr=1e-3))
    record = manifest["finetune"]
    alone = record["blockwise"]
    assert alone["jobs"] == 1
    known = bundle.verify(output)["finetune"]["blockwise"]
    assert [block["loss"] for block in alone["blocks"]] == [block["loss"] for block in known["blocks"]]
    assert record["kept"] == "weights" and record["epoch"] == 1
    assert record["accuracy"]["validation"]["after"] > alone["validation"]["after"]
    assert record["accuracy"]["validation"]["before"] == alone["validation"]["before"]


def test_a_killed_run_goes_on_and_teaches_no_block_twice(parent, taught, tmp_path):
    """SIGKILL once the first block is finished; the same command then gives what two processes gave undisturbed."""
    output, _, _ = taught
    words = ["finetune", str(parent), "--data", "digits", "--epochs", "0", "--batch", "50", "--threads", "2"]
    words += ["--blockwise", "1", "--blockwise-jobs", "1", "-o", str(tmp_path / "new")]
    work = tmp_path / ".new.training" / "blocks"
    child = subprocess.Popen([sys.executable, "-m", "derc", *words], stderr=subprocess.DEVNULL)
    while child.poll() is None and not (work / "block1" / "state.json").exists():
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (work / "block1" / "state.json").exists() and not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match=r"another command began \(blockwise differ\)"):
        tune(parent, tmp_path / "new", blockwise=2)
    said = []
    tune(parent, tmp_path / "new", said, blockwise_jobs=1)
    assert not moved(output, tmp_path / "new")
    assert [line for line in said if "pass 1/1" in line and line.startswith("block1")] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_with_frozen_blocks_only_the_stitch_asked_for_learns(parent, tmp_path):
    options = replace(NONE, allow_worse=True)
    asked = {"freeze": "blocks", "blockwise_blocks": "2", "blockwise_lr": 3e-2, "options": options}
    manifest = tune(parent, tmp_path / "new", **asked)
    assert moved(parent, tmp_path / "new") == {"stitch2.linear.weight", "stitch2.linear.bias"}
    (block,) = manifest["finetune"]["blockwise"]["blocks"]
    assert block["loss"]["after"] < block["loss"]["before"] and manifest["finetune"]["blockwise"]["lr"] == 3e-2


def test_what_makes_no_sense_is_one_sentence_and_leaves_nothing(parent, tmp_path):
    gone = resealed(parent, tmp_path / "gone", lambda m: m["zoo"].update(spec=str(tmp_path / "gone.toml")))
    other = resealed(parent, tmp_path / "other", lambda m: m["donors"]["convnext"].update(sha256="0"))
    whole = tmp_path / "whole"
    shutil.copytree(parent, whole)
    cases = [
        (parent, ["--blockwise", "-1"], "--blockwise is -1, and must be 0 or more"),
        (parent, ["--blockwise", "1", "--blockwise-jobs", "-1"], "--blockwise-jobs is -1"),
        (parent, ["--blockwise", "1", "--blockwise-lr", "-1"], "--blockwise-lr is -1.0, and must be a number above 0"),
        (parent, ["--blockwise-jobs", "2"], "--blockwise-jobs goes with --blockwise"),
        (parent, ["--blockwise", "1", "--blockwise-blocks", "4"], "there is no block '4', this network has 0, 1, 2"),
        (parent, ["--blockwise", "1", "--freeze", "all-but-head"], "give --freeze blocks or none"),
        (parent, ["--blockwise", "1", "--zoo", "gone.toml"], "zoo file gone.toml does not exist"),
        (gone, ["--blockwise", "1"], "cannot be had"),
        (other, ["--blockwise", "1"], "donor convnext of zoo is not what the bundle was made from"),
        (parent, ["--blockwise", "1", "--blockwise-lr", "1e30"], "lower --blockwise-lr, for instance to 1e+29"),
        (parent, ["--epochs", "0"], "--epochs is 0, and must be at least 1"),
    ]
    for folder, words, message in cases:
        done = command("finetune", folder, "--data", "digits", "--threads", "1", *words, "-o", tmp_path / "new")
        assert (done.returncode, message in done.stderr) == (2, True), done
        assert "Traceback" not in done.stderr and sorted(path.name for path in tmp_path.iterdir()) == [
            "gone",
            "other",
            "whole",
        ]


def test_a_network_without_a_stitch_is_told_so(tmp_path):
    """An intact donor has nothing to learn from itself."""
    small_zoo(tmp_path, "convnext")
    recipe = '\nzoo = "zoo.toml"\n[[block]]\ndonor = "convnext"\nfirst = "stages.0"\nlast = "stages.3"\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    words = ["assemble", str(tmp_path / "recipe.toml"), "--profile-s", "0.5", "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    with pytest.raises(UsageError, match="this network has no stitch: leave it out"):
        tune(tmp_path / "out", tmp_path / "new")
    manifest = tune(tmp_path / "out", tmp_path / "new", blockwise_blocks="0")
    (block,) = manifest["finetune"]["blockwise"]["blocks"]
    assert block["loss"] == {"before": 0.0, "after": 0.0} and not block["kept"]
    assert not moved(tmp_path / "out", tmp_path / "new") and manifest["finetune"]["kept"] == "before"
    assert np.isclose(manifest["finetune"]["blockwise"]["validation"]["after"], manifest["accuracy"]["validation"])
