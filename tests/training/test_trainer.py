"""The training loop: held against plain torch, resumed, frozen, out of memory, and what it refuses."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from derc.data import Split
from derc.errors import UsageError
from derc.training import TrainOptions, train
from derc.training.augment import Augmentation
from derc.training.checkpoint import Work
from derc.training.examples import Batches, as_examples
from derc.training.freeze import Freeze
from tests.training.small import Blocks, network, same, split

PLAIN = TrainOptions(
    epochs=1, batch=300, lr=0.1, optimizer="momentum", decay=0.0, clip=0.0, warmup=0.0, schedule="constant"
)
SHORT = TrainOptions(epochs=3, batch=50, lr=3e-3)
pytestmark = pytest.mark.usefixtures("one_thread")


def gradients_by_hand(one: nn.Module, examples: Split) -> dict[str, torch.Tensor]:
    """The gradients of the mean cross entropy over all images, in plain torch."""
    one.zero_grad()
    images, labels = next(examples.batches(len(examples)))
    F.cross_entropy(one(images), labels).backward()
    return {name: parameter.grad.clone() for name, parameter in one.named_parameters()}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_one_step_is_that_of_plain_torch(clip):
    one = network(norm=False)
    one.block0[3].p = 0.0
    reference, before = copy.deepcopy(one).train(), copy.deepcopy(one.state_dict())
    found = train(one, split("train"), split("validation"), replace(PLAIN, clip=clip, allow_worse=True))
    wanted = gradients_by_hand(reference, split("train"))
    norm = float(torch.stack([value.norm() for value in wanted.values()]).norm())
    scale = min(1.0, clip / norm) if clip else 1.0
    assert norm > 0.05 and found.steps == 1 and found.images == 300
    for name, value in found.network.state_dict().items():
        torch.testing.assert_close(value, before[name] - 0.1 * scale * wanted[name], atol=2e-6, rtol=1e-4)


def test_weight_decay_spares_biases_and_norms():
    one = network()
    before = copy.deepcopy(one.state_dict())
    for parameter in one.parameters():
        parameter.register_hook(torch.zeros_like)
    options = replace(PLAIN, optimizer="sgdw", decay=0.5, allow_worse=True)
    after = train(one, split("train"), split("validation"), options).network.state_dict()
    for name, _ in one.named_parameters():
        factor = 1 - 0.1 * 0.5 if before[name].dim() > 1 else 1.0
        torch.testing.assert_close(after[name], before[name] * factor)


@pytest.mark.parametrize(
    ("kind", "moving"),
    [("blocks", {"stitch1.weight", "stitch1.bias"}), ("all-but-head", {"block1.fc.weight", "block1.fc.bias"})],
)
def test_what_is_frozen_stays_bit_for_bit(kind, moving):
    one = network()
    before = copy.deepcopy(one.state_dict())
    freeze = Freeze(kind, "block1.fc")
    found = train(one, split("train"), split("validation"), replace(SHORT, allow_worse=True), trains=freeze)
    after = found.network.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == moving
    assert all(parameter.requires_grad for parameter in found.network.parameters())


def test_fixed_norms_keep_their_statistics_and_train_their_weights():
    one = network()
    before = copy.deepcopy(one.state_dict())
    after = train(one, split("train"), split("validation"), replace(SHORT, norms="fixed")).network.state_dict()
    assert torch.equal(before["block0.1.running_mean"], after["block0.1.running_mean"])
    assert not torch.equal(before["block0.1.weight"], after["block0.1.weight"])


def test_training_improves_and_its_log_tells():
    rows = []
    found = train(network(), split("train"), split("validation"), replace(SHORT, epochs=8), record=rows.append)
    assert found.after.accuracy > found.before.accuracy + 0.3 and found.kept == "weights"
    assert list(found.rows) == rows and [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["images"] == found.images == 8 * 300
    best = max(rows, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
    assert best["epoch"] == found.epoch and best["validation_accuracy"] == found.after.accuracy
    right = sum(int((found.network(x).argmax(1) == y).sum()) for x, y in split("validation").batches(64))
    assert right / 300 == found.after.accuracy


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    options = replace(SHORT, mixup=0.2, cutmix=0.5, smoothing=0.1, ema=0.9, augment="crop=2,rand-m5-mstd0.5")
    runs = [train(network(), split("train"), split("validation"), replace(options, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (run.network.state_dict() for run in runs)
    assert same(first, again) and not same(first, other)


class StopError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, optimizer):
    options = replace(SHORT, mixup=0.2, ema=0.9, augment="crop=2", optimizer=optimizer, checkpoint_s=1e-9)
    whole = train(network(), split("train"), split("validation"), options)
    one, steps = network(), []

    def stop(*_: object) -> None:
        if one.training:
            steps.append(1)
        if len(steps) == 9:
            raise StopError

    handle = one.stitch1.register_forward_hook(stop)
    work = Work(tmp_path / "work", {"seed": 0})
    work.open()
    with pytest.raises(StopError):
        train(one, split("train"), split("validation"), options, work=work)
    handle.remove()
    work.close()
    work.open()
    said = []
    rest = train(network(seed=7), split("train"), split("validation"), options, work=work, say=said.append)
    assert said == ["going on from step 8 of 18"]
    assert same(whole.network.state_dict(), rest.network.state_dict())
    plain = [{k: v for k, v in row.items() if k != "seconds"} for row in rest.rows]
    assert plain == [{k: v for k, v in row.items() if k != "seconds"} for row in whole.rows]
    assert (whole.before, whole.after, whole.epoch, whole.kept) == (rest.before, rest.after, rest.epoch, rest.kept)
    work.remove()
    assert not list(tmp_path.iterdir())


def test_a_finished_training_is_not_repeated(tmp_path):
    work = Work(tmp_path / "work", {})
    work.open()
    first = train(network(), split("train"), split("validation"), SHORT, work=work)
    again = train(network(seed=3), split("train"), split("validation"), SHORT, work=work)
    assert same(first.network.state_dict(), again.network.state_dict()) and first.rows == again.rows


class Narrow(nn.Module):
    """Has memory for at most 70 images while training."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one, self.most = one, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 70:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.most = max(self.most, len(x))
        return self.one(x)


def test_out_of_memory_halves_what_goes_through_and_keeps_the_step():
    narrow, said = Narrow(network(norm=False)), []
    narrow.one.block0[3].p = 0.0
    plain = network(norm=False)
    plain.block0[3].p = 0.0
    wide = train(plain, split("train"), split("validation"), replace(PLAIN, allow_worse=True)).network
    found = train(narrow, split("train"), split("validation"), replace(PLAIN, allow_worse=True), say=said.append)
    assert found.micro == 38 and narrow.most == 38 and found.steps == 1
    assert len(said) == 3 and "out of memory: 38 images at a time from here on, in batches of 300" in said[-1]
    for name, value in wide.state_dict().items():
        torch.testing.assert_close(value, narrow.one.state_dict()[name], atol=1e-6, rtol=1e-4)


WASTE = """
import resource, torch, onnx, timm.optim, timm.scheduler, timm.utils
from dataclasses import replace
from derc.training import train
from tests.training.small import network, split
from tests.training.test_trainer import PLAIN
torch.set_num_threads(1)

class Wasteful(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = network(norm=False)

    def forward(self, x):
        return self.one(x) + 0 * torch.ones(len(x), 1_000_000)[:, :1]

one, images = Wasteful(), split("train")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20,) * 2)
print(train(one, images, split("validation"), replace(PLAIN, allow_worse=True)).micro)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is limited through Linux' address space")
def test_memory_that_really_runs_out_is_told_from_a_bug():
    """4 MB for an image, 500 MB in all: 300 and 150 at a time do not fit, 75 do."""
    done = subprocess.run([sys.executable, "-c", WASTE], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "75"


def test_no_memory_for_one_image_is_said():
    one = network()
    one.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(UsageError, match="not enough memory to train this network on one image"):
        train(one, split("train"), split("validation"), SHORT)


def test_a_training_that_makes_it_worse_keeps_the_network_unless_asked():
    good = train(network(), split("train"), split("validation"), replace(SHORT, epochs=8)).network
    state = copy.deepcopy(good.state_dict())
    wild = replace(SHORT, optimizer="adamw", lr=1.0, epochs=1, clip=0.0, schedule="constant")
    found = train(copy.deepcopy(good), split("train"), split("validation"), wild)
    assert found.kept == "before" and found.epoch == 0 and same(state, found.network.state_dict())
    worse = train(copy.deepcopy(good), split("train"), split("validation"), replace(wild, allow_worse=True))
    assert worse.kept == "weights" and worse.after.accuracy < found.after.accuracy


def test_a_loss_that_is_no_number_names_step_and_rate():
    options = replace(SHORT, lr=1e30, optimizer="sgd", clip=0.0, warmup=0.0)
    with pytest.raises(UsageError, match=r"the loss is (nan|inf) at step 2 \(epoch 1\): lower --lr"):
        train(network(norm=False), split("train"), split("validation"), options)


def test_the_time_limit_ends_it_with_the_best_so_far():
    found = train(network(), split("train"), split("validation"), replace(SHORT, epochs=1000, limit_s=0.5))
    assert found.stopped and 0 < found.steps < 6000 and 0.5 <= found.seconds < 30 and found.kept != "before"


def test_labels_that_make_no_sense_are_refused():
    digits, rest = split("train"), split("validation")
    alone = Split(digits.images[:20], np.full(20, 3))
    for images, message in (
        (alone, "all 20 training images are of class 3"),
        (Split(digits.images, None), "have no labels"),
        (Split(digits.images, digits.labels + 5), "labels name 15 classes, and the network has 10 outputs"),
        (Split(digits.images[:0], digits.labels[:0]), "no training images"),
    ):
        with pytest.raises(UsageError, match=message):
            train(network(), images, rest, SHORT)


def test_broken_networks_are_refused_before_training():
    one = network()
    one.block0[1].running_var.fill_(float("nan"))
    with pytest.raises(UsageError, match="NaN or infinity before any training"):
        train(one, split("train"), split("validation"), SHORT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs is 0, and must be at least 1"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"optimizer": "adamv"}, "--optimizer 'adamv' is unknown"),
        ({"schedule": "cosinus"}, "did you mean 'cosine'"),
        ({"augment": "flop"}, "--augment 'flop' is unknown"),
        ({"augment": "rand-q7"}, "--augment 'rand-q7' is unknown"),
        ({"mixup": 0.2, "batch": 33}, "--batch is 33, and must be even for mixup"),
        ({"teacher_share": 1.5}, "--teacher-share is 1.5"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 needs a GPU"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used here"),
        ({"limit_s": 0.0}, "--limit-s is 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        train(network(), split("train"), split("validation"), replace(SHORT, **change))


def test_a_teacher_alone_is_learnt_from():
    """A network taught by another one comes to answer as that does, without the labels' help."""
    teacher = train(network(seed=5), split("train"), split("validation"), replace(SHORT, epochs=8)).network
    wrong = Split(split("train").images, np.roll(split("train").labels, 1))
    options = replace(SHORT, epochs=8, teacher_share=1.0, temperature=2.0)
    found = train(network(), wrong, split("validation"), options, teacher=teacher)
    assert found.after.accuracy > 0.4
    assert found.rows[-1]["teacher_loss"] < found.rows[0]["teacher_loss"] / 2
    assert found.rows[-1]["loss"] == pytest.approx(found.rows[-1]["teacher_loss"])


def test_columns_train_a_part_of_the_outputs():
    few = [i for i, label in enumerate(split("train").labels) if label in (3, 7)]
    pairs = Split(split("train").images[few], (split("train").labels[few] == 7).astype(np.int64))
    one = network()
    before = one.block1.fc.weight.detach().clone()
    found = train(one, pairs, pairs, replace(SHORT, epochs=10, batch=20, decay=0.0), columns=(3, 7))
    assert found.after.accuracy > 0.9
    moved = (before != one.block1.fc.weight).any(1).nonzero().flatten().tolist()
    assert moved == [3, 7]


def test_bf16_by_accelerate_trains_too():
    found = train(network(), split("train"), split("validation"), replace(SHORT, epochs=6, precision="bf16"))
    assert found.after.accuracy > found.before.accuracy + 0.2
    assert all(value.dtype != torch.bfloat16 for value in found.network.state_dict().values())


TWO = """
import sys, torch
torch.set_num_threads(1)
from dataclasses import replace
from safetensors.torch import save_file
from derc.training import TrainOptions, train
from tests.training.small import network, split
from tests.training.test_trainer import PLAIN
one = network(norm=False)
one.block0[3].p = 0.0
options = replace(PLAIN, batch=60, epochs=2, allow_worse=True, device="cpu")
found = train(one, split("train"), split("validation", 101), options)
if int(__import__("os").environ.get("RANK", "0")) == 0:
    save_file(found.network.state_dict(), sys.argv[1])
    print(found.after.accuracy, found.images)
"""


def test_two_processes_train_as_one_does(tmp_path):
    """Through Accelerate and gloo on one processor: the same batches, shared, give the same weights up to rounding."""
    from safetensors.torch import load_file

    script, said = tmp_path / "two.py", []
    script.write_text(TWO)
    alone = [sys.executable, str(script), str(tmp_path / "one.safetensors")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in (alone, [*torchrun, str(script), str(tmp_path / "two.safetensors")]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said[0] == said[1]
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


def environment() -> dict[str, str]:
    """Of a process that finds the tests, on one thread and no GPU."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_step_alone(workers):
    batches = Batches(as_examples(split("train", 50)), 16, 3, Augmentation.parse("flip,crop=3"))
    assert batches.per_epoch == 3
    epoch = np.concatenate([batches.chosen(step) for step in range(3, 6)])
    assert len(np.unique(epoch)) == 48 and not np.array_equal(
        epoch, np.concatenate([batches.chosen(s) for s in range(3)])
    )
    streamed = list(batches.stream(2, 6, workers))
    again = Batches(as_examples(split("train", 50)), 16, 3, Augmentation.parse("flip,crop=3"))
    for step, (images, labels) in enumerate(streamed, start=2):
        wanted = again[step]
        assert torch.equal(images, wanted[0]) and torch.equal(labels, wanted[1])


def test_blocks_alone_leave_nothing_to_train_without_stitches():
    one = Blocks()
    one.stitch1 = nn.Identity()
    with pytest.raises(UsageError, match="nothing is left to train"):
        train(one, split("train"), split("validation"), SHORT, trains=Freeze("blocks"))
