"""derc finetune: real trainings of a stitched network on scanned digits, from bundle to bundle."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from derc import bundle
from derc.bench import bench_bundle, load_engine
from derc.cli import cli
from derc.completing import build_bundle, opened
from derc.console import Console
from derc.digits import load_split
from derc.errors import (
    IntegrityError,
    MissingDependencyError,
    OverBudgetError,
    UsageError,
)
from derc.finetuning import Finetune, finetune_bundle
from derc.images import resize
from derc.training import TrainOptions
from tests.commands import command
from tests.conftest import small_zoo
from tests.test_completing import ABSENT, HERE

RECIPE = """
zoo = "zoo.toml"

[[block]]
donor = "resnet-slim"
first = "layer1"
last = "layer2"

[[block]]
donor = "convnext"
first = "stages.2"
last = "stages.3"
"""
QUIET = Console(quiet=True)
SHORT = TrainOptions(epochs=2, lr=2e-3)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A bundle of two donors' blocks with a random stitch between them: it knows nothing."""
    folder = tmp_path_factory.mktemp("parent")
    small_zoo(folder, "resnet-slim", "convnext", "regnet-parity")
    (folder / "recipe.toml").write_text(RECIPE)
    words = ["assemble", str(folder / "recipe.toml"), "--profile-s", "1", "-o", str(folder / "out")]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "out"


def tune(folder, output, **kwargs):
    asked = Finetune(folder, "digits", output, options=SHORT, threads=1, measure_s=0.5)
    return finetune_bundle(replace(asked, **kwargs), QUIET)


@pytest.fixture(scope="module")
def tuned(parent, tmp_path_factory):
    """(bundle, manifest) of that network after two epochs."""
    output = tmp_path_factory.mktemp("tuned") / "new"
    return output, tune(parent, output)


def heldout():
    images, labels = load_split("heldout")
    return torch.from_numpy(resize(images, (3, 32, 32)).transpose(0, 3, 1, 2).copy()).float() / 255, labels


def right(network) -> float:
    images, labels = heldout()
    with torch.no_grad():
        return float((network(images).argmax(1).numpy() == labels).mean())


def test_a_stitched_network_learns_and_its_new_bundle_is_whole(parent, tuned):
    output, manifest = tuned
    record = manifest["finetune"]
    assert bundle.verify(output)["seal"] == manifest["seal"] and manifest["status"] == "ok"
    assert [path.name for path in output.parent.iterdir()] == ["new"]
    assert right(bundle.load(parent)) == record["accuracy"]["heldout"]["before"] < 0.3
    assert right(bundle.load(output)) == record["accuracy"]["heldout"]["after"] == manifest["accuracy"]["heldout"] > 0.7
    assert record["accuracy"]["validation"]["after"] > 0.7 and record["kept"] == "weights"
    assert record["images"] == 2 * (1200 // 64) * 64 and record["seconds"] > 0
    assert record["parent"]["seal"] == bundle.verify(parent)["seal"]
    assert (output / "model.py").read_text() == (parent / "model.py").read_text()


def test_its_engine_was_verified_and_measured_and_answers_as_the_module(tuned):
    output, manifest = tuned
    assert manifest["latency"]["provenance"] == "measured" and manifest["latency"]["measured_ms"] > 0
    assert manifest["latency"]["foreseen"]["provenance"] == "recorded"
    parity = manifest["parity"]
    assert all(parity[pair] <= parity["tolerance"] for pair in ("module_onnx", "onnx_engine", "module_engine"))
    session = load_engine(output, opened(manifest))
    image = heldout()[0][:1]
    with torch.no_grad():
        wanted = bundle.load(output)(image).numpy()
    np.testing.assert_allclose(session.run(image.numpy()), wanted, atol=1e-4 * max(1, abs(wanted).max()))
    session.close()


def test_the_log_and_the_page_tell_of_it(tuned):
    output, manifest = tuned
    rows = list(csv.DictReader((output / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["validation_accuracy"]) == manifest["finetune"]["log"][-1]["validation_accuracy"]
    page = (output / "report.html").read_text()
    assert "The fine-tuning" in page and "before fine-tuning" in page
    assert "derc finetune" in (output / "reproduce.sh").read_text()


def test_it_can_be_built_measured_and_trained_again(tuned, tmp_path):
    output, manifest = tuned
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    built = build_bundle(copy, 1.0, QUIET)
    assert built["finetune"] == manifest["finetune"] and (copy / "log.csv").exists()
    assert bench_bundle(copy, 1.0, QUIET)["status"] == "ok"
    again = tune(copy, tmp_path / "again", options=replace(SHORT, epochs=1))
    assert again["lineage"] == [manifest["finetune"]]
    assert again["finetune"]["accuracy"]["heldout"]["before"] == manifest["accuracy"]["heldout"]
    assert again["accuracy"]["validation"] >= manifest["accuracy"]["validation"]


def moved(parent: Path, output: Path) -> set[str]:
    """Names of the weights that differ."""
    before, after = (load_file(folder / "weights.safetensors") for folder in (parent, output))
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_teacher_from_the_zoo(parent, tmp_path):
    options = replace(SHORT, teacher_share=1.0)
    manifest = tune(parent, tmp_path / "new", teacher="donor", options=options)
    assert manifest["finetune"]["teacher"] == "convnext" and manifest["accuracy"]["heldout"] > 0.6
    assert manifest["finetune"]["log"][0]["teacher_loss"] > manifest["finetune"]["log"][1]["teacher_loss"] > 0
    with pytest.raises(UsageError, match=r"the teacher convnet cannot be had .*did you mean 'convnext'.*--zoo"):
        tune(parent, tmp_path / "other", teacher="convnet")
    with pytest.raises(UsageError, match=r"the teacher regnet-parity cannot teach the classes 0, 1, 2, .*\(10\)"):
        tune(parent, tmp_path / "other", teacher="regnet-parity")
    with pytest.raises(UsageError, match=r"zoo file gone.toml does not exist"):
        tune(parent, tmp_path / "other", teacher="convnext", zoo="gone.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_worse_than_the_parent_is_not_kept(tuned, tmp_path):
    output, manifest = tuned
    wild = replace(SHORT, lr=0.5, epochs=1, schedule="constant")
    kept = tune(output, tmp_path / "kept", options=wild)
    assert not moved(output, tmp_path / "kept")
    assert kept["finetune"]["kept"] == "before" and kept["accuracy"]["heldout"] == manifest["accuracy"]["heldout"]
    assert "the weights are the parent" in (tmp_path / "kept" / "report.html").read_text()


def test_a_killed_training_goes_on_and_ends_the_same(parent, tmp_path):
    """SIGKILL after the first checkpoint; the same command then gives what an undisturbed one gives, bit for bit."""
    tune(parent, tmp_path / "whole", options=replace(SHORT, epochs=3))
    work, said = tmp_path / ".new.training", []
    words = ["finetune", str(parent), "--data", "digits", "--epochs", "3", "--lr", "0.002", "--threads", "1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "derc", *words, "-o", str(tmp_path / "new")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while child.poll() is None and not (work / "state.json").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert work.exists() and not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match=r"holds a training that another command began \(epochs differ\)"):
        tune(parent, tmp_path / "new")
    console = Console(quiet=True)
    console.say = said.append
    asked = Finetune(parent, "digits", tmp_path / "new", options=replace(SHORT, epochs=3), threads=1, measure_s=0.5)
    finetune_bundle(asked, console)
    assert {"going on from step 18 of 54", "going on from step 36 of 54"} & set(said)
    assert not moved(tmp_path / "whole", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "whole"]


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray | None) -> str:
    np.savez(path, x=np.repeat(images, 3, axis=3), **({} if labels is None else {"y": labels}))
    return f"npz:{path}"


def test_what_makes_no_sense_is_one_sentence_and_leaves_nothing(parent, tmp_path):
    images, labels = load_split("train")
    (tmp_path / "data").mkdir()
    one = write_npz(tmp_path / "data" / "one.npz", images, np.zeros_like(labels))
    many = write_npz(tmp_path / "data" / "many.npz", images, np.arange(len(labels)) % 12)
    none = write_npz(tmp_path / "data" / "none.npz", images, None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = [
        (str(parent), ["--data", "digits", "--epochs", "0"], 2, "--epochs is 0"),
        (str(tmp_path / "data"), ["--data", "digits"], 8, "is not a derc bundle"),
        (str(parent), ["--data", many], 2, r"are not the network's (0, 1, 2, 3, 4, … (10))"),
        (str(parent), ["--data", one], 2, "all 585 training images are of class 0"),
        (str(parent), ["--data", none], 2, "have no labels"),
        (str(parent), ["--data", "digit"], 2, "did you mean 'digits'"),
        (str(parent), ["--data", "digits", "--freeze", "block"], 2, "did you mean 'blocks'"),
        (str(parent), ["--data", "digits", "--lr", "1e30", "--optimizer", "sgd", "--clip", "0"], 2, "lower --lr"),
        (str(parent), ["--data", "digits", "--teacher", "nobody"], 2, "the teacher nobody cannot be had"),
        (str(parent), ["--data", "digits", "-o", str(tmp_path / "full")], 2, "is not empty"),
    ]
    for folder, words, code, message in cases:
        output = [] if "-o" in words else ["-o", str(tmp_path / "new")]
        done = command("finetune", folder, *words, *output)
        assert (done.returncode, message in done.stderr) == (code, True), done
        assert done.stderr.count("\n") == 1 + done.stderr.count("choosing by"), done
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "full"]


def resealed(folder: Path, copy: Path, change) -> Path:
    """A copy of a bundle with a changed manifest."""
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(bundle.seal(manifest)))
    return copy


def test_for_a_device_that_is_not_here_nothing_is_claimed(parent, tmp_path):
    device = tmp_path / "mine.toml"
    device.write_text(ABSENT)

    def elsewhere(manifest):
        manifest["target"] |= {"name": "mine", "file": str(device)}
        manifest["selected"]["blocks"][0]["precision"] = "int8"

    copy = resealed(parent, tmp_path / "copy", elsewhere)
    manifest = tune(copy, tmp_path / "new", float32=True, options=replace(SHORT, epochs=1))
    assert [block["precision"] for block in manifest["selected"]["blocks"]] == ["fp32", "fp32"]
    assert manifest["status"] == "unmeasured" and not list((tmp_path / "new").glob("engine*"))
    assert manifest["latency"]["measured_ms"] is None and manifest["latency"]["provenance"] == "recorded"
    with pytest.raises(MissingDependencyError):
        build_bundle(tmp_path / "new", 1.0, QUIET)
    device.write_text(HERE)
    assert build_bundle(tmp_path / "new", 1.0, QUIET)["latency"]["provenance"] == "measured"


def test_over_the_budget_is_said_after_the_bundle_is_written(parent, tmp_path):
    copy = resealed(parent, tmp_path / "copy", lambda m: m["budget"].update(latency_ms=1e-4))
    with pytest.raises(OverBudgetError, match=f"the bundle {tmp_path / 'new'} holds it"):
        tune(copy, tmp_path / "new", freeze="all-but-head", options=replace(SHORT, epochs=1, lr=1e-2))
    assert bundle.verify(tmp_path / "new")["status"] == "over_budget"
    assert moved(parent, tmp_path / "new") == {"block1.head.fc.weight", "block1.head.fc.bias"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "new"]


def test_blocks_keep_their_precision_in_the_engine(parent, tmp_path):
    copy = resealed(parent, tmp_path / "copy", lambda m: m["selected"]["blocks"][1].update(precision="int8"))
    manifest = tune(copy, tmp_path / "new")
    model = (tmp_path / "new" / "model.onnx").read_bytes()
    assert b"QuantizeLinear" in model and manifest["parity"]["relative"]
    session = load_engine(tmp_path / "new", opened(manifest))
    images, labels = heldout()
    answers = np.concatenate([session.run(image[None].numpy()) for image in images]).argmax(1)
    session.close()
    assert abs((answers == labels).mean() - manifest["accuracy"]["heldout"]) < 0.05


def test_a_changed_bundle_is_not_trained(parent, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(parent, copy)
    (copy / "model.py").write_text((copy / "model.py").read_text() + "\n")
    with pytest.raises(IntegrityError, match=r"model.py is not what derc wrote"):
        tune(copy, tmp_path / "new")


def test_blocks_stay_as_they_are_while_tensorboard_is_told(parent, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = replace(SHORT, lr=1e-2)
    manifest = tune(parent, tmp_path / "new", tensorboard=tmp_path / "events", freeze="blocks", options=options)
    assert moved(parent, tmp_path / "new") == {"stitch1.linear.weight", "stitch1.linear.bias"}
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    found = [event.value for event in events.Scalars("derc/loss")]
    assert found == pytest.approx([row["loss"] for row in manifest["finetune"]["log"]], rel=1e-5)


PLAIN = Path(__file__).parents[1] / "examples" / "finetune_plain.py"


def test_the_bundle_trains_in_a_loop_of_ones_own_without_derc(parent, tmp_path):
    """The example in a process that cannot import derc, timm's own packages aside."""
    images, labels = load_split("train")
    np.savez(tmp_path / "digits.npz", x=resize(images, (3, 32, 32)), y=labels)
    blocked = (
        "import sys, runpy; sys.modules['derc'] = None; "
        f"sys.argv = ['x', {str(parent)!r}, {str(tmp_path / 'digits.npz')!r}, {str(tmp_path / 'w.safetensors')!r}]; "
        f"runpy.run_path({str(PLAIN)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", blocked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    shares = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert shares[-1] > shares[0] + 0.3
    network = bundle.load(parent)
    network.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert right(network) > 0.6
