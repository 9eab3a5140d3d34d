"""derc finetune --against: several networks trained alike, of which one is the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save

from derc import bundle, rivals
from derc.cli import cli
from derc.console import Console
from derc.finetuning import Finetune, finetune_bundle
from derc.training import TrainOptions, train
from derc.training.data import load
from tests.commands import command
from tests.conftest import small_zoo
from tests.test_finetune import RECIPE, resealed, right

DONOR = """
zoo = "zoo.toml"

[[block]]
donor = "resnet-slim"
first = "layer1"
last = "layer4"
"""
SHORT = TrainOptions(epochs=1, lr=1e-4)


class Told(Console):
    """Keeps what is said; interrupts at the second line that begins with `stop`."""

    def __init__(self, stop: str = "") -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.stop = stop

    def say(self, text: str) -> None:
        self.lines.append(text)
        if self.stop and sum(line.startswith(self.stop) for line in self.lines) == 2:
            raise KeyboardInterrupt


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> tuple[Path, Path, Path]:
    """An assembly with a random stitch, a donor as it is, and that donor without its weights."""
    folder = tmp_path_factory.mktemp("bundles")
    small_zoo(folder, "resnet-slim", "convnext")
    for name, recipe in (("assembly", RECIPE), ("donor", DONOR)):
        (folder / f"{name}.toml").write_text(recipe)
        words = ["assemble", str(folder / f"{name}.toml"), "--profile-s", "1", "-o", str(folder / name)]
        result = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return folder / "assembly", folder / "donor", without_weights(folder / "donor", folder / "blank")


def without_weights(folder: Path, copy: Path) -> Path:
    """A copy of a bundle whose weights are random and small."""
    random = torch.Generator().manual_seed(0)
    given = load_file(folder / "weights.safetensors")
    for name, value in given.items():
        if value.is_floating_point() and value.dim() > 1 and not name.startswith("normalize"):
            given[name] = 0.05 * torch.randn(value.shape, generator=random)
    data = save(given)
    resealed(folder, copy, lambda m: m["files"].update({"weights.safetensors": bundle.sha256(data)}))
    (copy / "weights.safetensors").write_bytes(data)
    return copy


def tune(folder, output, console=None, **kwargs):
    asked = Finetune(folder, "digits", output, options=SHORT, threads=1, measure_s=0.5)
    return finetune_bundle(replace(asked, **kwargs), console or Told())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


@pytest.fixture(scope="module")
def answer(bundles, tmp_path_factory):
    """(bundle, manifest, what was said) of the assembly held against the donor."""
    output, console = tmp_path_factory.mktemp("answer") / "new", Told()
    return output, tune(bundles[0], output, console, against=(bundles[1],)), console.lines


def test_the_better_network_is_shipped_as_if_it_had_been_trained_alone(bundles, answer):
    output, manifest, _ = answer
    assert bundle.verify(output)["seal"] == manifest["seal"]
    assert [path.name for path in output.parent.iterdir()] == ["new"]
    assert manifest["selected"]["assembly"] == bundle.read(bundles[1])["selected"]["assembly"] == "resnet-slim[0:23]"
    data = load("digits", (3, 32, 32), 0)
    alone = train(bundle.load(bundles[1]), data.train, data.validation, replace(SHORT, device="cpu")).network
    shipped = weights(output)
    assert all(torch.equal(shipped[name], value) for name, value in alone.state_dict().items())
    assert right(bundle.load(output)) == manifest["accuracy"]["heldout"] == right(alone)
    assert (output / "model.py").read_text() == (bundles[1] / "model.py").read_text()
    assert manifest["finetune"]["parent"]["path"] == str(bundles[1].absolute())


def test_all_that_were_trained_are_told(bundles, answer):
    output, manifest, lines = answer
    told = manifest["finetune"]["against"]
    assert [one["path"] for one in told] == [str(path.absolute()) for path in bundles[:2]]
    assert [one["kept"] for one in told] == [False, True]
    assert told[0]["validation"]["after"] < told[1]["validation"]["after"]
    assert told[1]["heldout"]["after"] == manifest["accuracy"]["heldout"]
    assert len({one["images"] for one in told}) == 1  # as many images for each
    assert sum(line.startswith("training ") for line in lines) == 2
    assert any(line.endswith("is the answer") for line in lines)
    assert f"--against {bundles[1].absolute()}" in (output / "reproduce.sh").read_text()
    page = (output / "report.html").read_text()
    assert "Trained alike" in page and str(bundles[0].absolute()) in page


def test_an_interrupted_run_goes_on_and_answers_the_same(bundles, answer, tmp_path):
    """Interrupted when the second network begins to train."""
    output = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        tune(bundles[0], output, Told("training "), against=(bundles[1],))
    assert not output.exists()
    console = Told()
    tune(bundles[0], output, console, against=(bundles[1],))
    assert any(line.startswith("going on from step 18 of 18") for line in console.lines)
    one, other = weights(output), weights(answer[0])
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_assembly_that_is_significantly_ahead_replaces_a_donor_within_its_budget(bundles, tmp_path):
    limited = resealed(bundles[2], tmp_path / "limited", lambda m: m["budget"].update(latency_ms=1000.0))
    learns = replace(SHORT, lr=2e-3)
    manifest = tune(limited, tmp_path / "new", against=(bundles[0],), options=learns)
    blank, assembly = (one["validation"]["after"] for one in manifest["finetune"]["against"])
    assert assembly > blank + 0.1 and manifest["accuracy"]["validation"] == assembly
    assert "convnext" in manifest["selected"]["assembly"]
    assert manifest["budget"]["latency_ms"] == 1000.0 and manifest["status"] == "ok"


def test_what_cannot_be_compared_is_one_sentence_and_leaves_nothing(bundles, tmp_path):
    assembly, donor, _ = bundles
    small = resealed(assembly, tmp_path / "small", lambda m: m["budget"].update(params_m=1e-3))
    fast = resealed(assembly, tmp_path / "fast", lambda m: m["budget"].update(latency_ms=1e-3))
    wide = resealed(donor, tmp_path / "wide", lambda m: m["target"].update(batch=4))
    cases = [
        (assembly, [assembly], [], 2, "is the same bundle as"),
        (assembly, [donor, donor], [], 2, "is the same bundle as"),
        (assembly, [wide], [], 2, "give a bundle for the same target"),
        (small, [donor], [], 2, "M parameters, over the budget of 0.001"),
        (fast, [donor], [], 2, "over the budget of 0.001 ms"),
        (assembly, [tmp_path], [], 8, "is not a derc bundle"),
        (assembly, [donor], ["--freeze", "blocks"], 2, "would have nothing to train"),
        (assembly, [donor], ["--blockwise", "1"], 2, "--blockwise does not go with --against"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for folder, others, words, code, message in cases:
        against = [word for other in others for word in ("--against", str(other))]
        done = command("finetune", folder, "--data", "digits", *against, *words, "-o", tmp_path / "new")
        assert (done.returncode, message in done.stderr, done.stderr.count("\n")) == (code, True, 1), done
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_answer_is_the_one_that_brute_force_finds():
    """A donor gives way only to an assembly that is significantly ahead, and the best of those comes first."""
    random = np.random.default_rng(0)
    for _ in range(300):
        count = int(random.integers(1, 5))
        donors = [bool(flag) for flag in random.random(count) < 0.5]
        right = [random.random(60) < share for share in random.uniform(0.4, 0.9, count)]
        ranks = [(float(one.mean()), float(loss)) for one, loss in zip(right, random.random(count), strict=True)]
        found = rivals.place(ranks, donors, right)
        best = max((n for n in range(count) if donors[n]), key=lambda n: ranks[n], default=None)
        allowed = [
            n for n in range(count) if best in (None, n) or (not donors[n] and significant(right[n], right[best]))
        ]
        assert found == max(allowed, key=lambda n: ranks[n])


def significant(ours, theirs) -> bool:
    wins = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    losses = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return wins - losses > (wins + losses) ** 0.5
