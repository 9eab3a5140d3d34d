"""derc assemble, as a user runs it: bundles that load and train, and one sentence for what cannot be built."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from torch import nn

import derc
from derc import bench, bundle
from derc.artifacts import BlockRef
from derc.assembled import assemble
from derc.assembling import open_context, open_recipe, stitch
from derc.cli import main
from derc.config import resolve
from derc.console import Console
from derc.data import Data
from derc.parts import parts
from tests.recipes import PLAIN, STITCHED, write_recipe


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: exit code, standard output and the last line of standard error."""
    before = signal.getsignal(signal.SIGINT)

    def call(*words):
        monkeypatch.setattr("sys.argv", ["derc", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, (err.strip().splitlines() or [""])[-1]

    yield call
    signal.signal(signal.SIGINT, before)


def built(recipe, data=None, seed=0):
    """What `derc assemble` emits, in memory, and its plan."""
    flags = {"zoo": str(recipe.parent / "zoo.toml"), "data": data, "seed": seed, "probe": 64}
    settings, console = resolve(flags, {}, None), Console(quiet=True)
    _, made, store = open_recipe(recipe, settings, console)
    probe = open_context(settings, made, store, console).data.probe if data else None
    return made, *stitch(made, probe, seed)


def images(count=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """(recipe, bundle) with every fresh kind of part and no data."""
    folder = tmp_path_factory.mktemp("fresh")
    return write_recipe(folder, STITCHED, "resnet", "swin"), folder / "out"


def test_a_recipe_without_data_gives_a_whole_bundle(fresh, run):
    recipe, out = fresh
    code, _, last = run("assemble", recipe, "-o", out, "--profile-s", 2)
    assert code == 0, last
    manifest = bundle.verify(out)
    selected = manifest["selected"]
    assert [(s["kind"], s["stride"], s["weights"], s["residual"]) for s in selected["stitches"]] == [
        ("dery", 1, "random", None),
        ("dery-fc", 1, "random", None),
        ("dery", 2, "random", None),
        ("dery", 1, "random", None),
    ]
    assert selected["stem"]["kind"] == "conv7x7(64)"
    assert selected["head"]["kind"] == "linear(5)"
    assert manifest["data"] == "random"
    assert manifest["latency"]["provenance"] == "measured"
    assert set(manifest["donors"]) == {"resnet", "swin", "resnet@64x64"}
    assert all(donor["weights"].startswith("none") for donor in manifest["donors"].values())
    assert max(manifest["parity"][name] for name in ("module_onnx", "module_engine")) <= manifest["parity"]["tolerance"]
    plan = (out / "plan.txt").read_text()
    assert "// stitch1: random" in plan
    assert "head = head @" in plan
    assert "conv7x7" in (out / "report.html").read_text()


def test_the_emitted_module_is_the_assembly(fresh):
    recipe, out = fresh
    made, stitched, _ = built(recipe)
    network, reference = derc.load(out), assemble(made.assembly, made.lowered, stitched.states)
    with torch.no_grad():
        assert torch.equal(network(images()), reference(images()))
    total = json.loads((out / "manifest.json").read_text())["selected"]["params"]
    assert sum(p.numel() for p in network.parameters()) == total
    imported = {
        line.split()[1].split(".")[0]
        for line in (out / "model.py").read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imported == {"pathlib", "safetensors", "timm", "torch"}


def test_the_emitted_module_trains_and_takes_a_new_head(fresh):
    network = derc.load(fresh[1]).train()
    network(images()).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    other = derc.load(fresh[1], num_classes=7)
    assert isinstance(other.head.linear, nn.Linear)
    with torch.no_grad():
        assert other(images()).shape == (4, 7)


def test_bench_measures_the_bundle_beside_the_donors(fresh):
    found = bench.bench_bundle(fresh[1], 2.0, Console(quiet=True))
    assert set(found["latency"]) == {"engine", "eager PyTorch", "resnet", "swin"}
    assert found["budget_ms"] is None


def test_linear_stitches_are_fitted_where_there_is_data(tmp_path, run):
    recipe = write_recipe(tmp_path, PLAIN)
    words = ["--data", "digits", "--probe", 64, "--profile-s", 2, "--json"]
    code, out, last = run("assemble", recipe, "-o", tmp_path / "o", *words)
    assert code == 0, last
    selected = json.loads(out)["selected"]
    (joint,) = selected["stitches"]
    assert joint["weights"] == "fitted"
    assert 0 <= joint["residual"] < 1
    assert json.loads(out)["accuracy"]["heldout"] is not None
    made, stitched, fitted = built(recipe, "digits")
    assert fitted["stitch1"] == pytest.approx(joint["residual"], abs=1e-6)
    _, random, none = built(recipe)
    assert none == {}
    target = made.lowered["vit"].block(0, made.assembly.blocks[1].first)
    scans = next(iter(Data.load("digits").heldout.batches(64)))[0]
    with torch.no_grad():
        want = target(scans)
        errors = [float((front(made, one)(scans) - want).square().mean()) for one in (stitched, random)]
        nothing = float((want - want.mean((0, 1))).square().mean())
    assert errors[0] < 0.5 * min(errors[1], nothing)


def front(made, stitched):
    """The network up to and with its first stitch."""
    return nn.Sequential(*assemble(made.assembly, made.lowered, stitched.states).parts[:2])


def test_random_weights_follow_the_seed(tmp_path):
    recipe = write_recipe(tmp_path, STITCHED)
    states = [built(recipe, seed=seed)[1].states for seed in (0, 0, 1)]
    pairs = [
        (a["conv.weight"], b["conv.weight"]) for a, b in ((states[0][0], states[1][0]), (states[0][0], states[2][0]))
    ]
    assert (pairs[0][0] == pairs[0][1]).all()
    assert (pairs[1][0] != pairs[1][1]).any()


def test_a_stitch_into_a_block_on_another_grid_stays_random(tmp_path):
    text = STITCHED.replace('stitch = "dery"\ngrid = "keep"', 'stitch = "linear"\ngrid = "keep"')
    made, _, fitted = built(
        write_recipe(tmp_path, text.replace('stitch = "dery"\nstride = 2', 'stitch = "linear"')), "digits"
    )
    kinds = {part.name: part.spec.kind for part in parts(made.assembly, made.lowered) if part.kind == "stitch"}
    assert kinds == {"stitch1": "dery", "stitch2": "dery-fc", "stitch3": "linear", "stitch4": "linear"}
    assert set(fitted) == {"stitch3"}
    assert isinstance(made.assembly.blocks[4], BlockRef)
    assert made.assembly.blocks[4].donor == "resnet@64x64"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (PLAIN, "", ["recipe.toml has no blocks"]),
        (PLAIN, "[[block", ["recipe.toml is not valid TOML"]),
        ('donor = "vit"', 'donor = "vitt"', ["recipe.toml, block 2", "did you mean 'vit'"]),
        ("blocks.3", "blocks.9", ["recipe.toml, block 2", "no module 'blocks.9'"]),
        ("layer2.0", "layer2.0.conv1", ["recipe.toml, block 1", "is no cut", "layer2.0"]),
        ('first = "layer1"', 'first = "layer3"', ["recipe.toml, block 1", "comes after"]),
        ('last = "blocks.3"', 'last = "blocks.3"\nstitch = "glue"', ["recipe.toml, block 2", "'glue'", "'linear'"]),
        ('last = "blocks.3"', 'last = "blocks.3"\nstitch = "dery"', ["recipe.toml, block 2", "dery stitch joins"]),
        (
            'last = "blocks.3"',
            'last = "blocks.3"\n[head]\nkind = "linear"\nclasses = 0',
            ["[head]", "classes", "not 0"],
        ),
        ('zoo = "zoo.toml"', "", ["names no zoo", "--zoo"]),
        ('zoo = "zoo.toml"', 'zoo = "zo.toml"', ["zo.toml does not exist"]),
    ],
)
def test_a_wrong_recipe_is_one_sentence(tmp_path, run, old, new, says):
    assert old in PLAIN
    recipe = write_recipe(tmp_path, PLAIN.replace(old, new))
    code, _, last = run("assemble", recipe, "-o", tmp_path / "o")
    assert code == 2, last
    assert last.startswith("derc: ")
    for words in says:
        assert words in last
    assert not (tmp_path / "o").exists()


def test_an_output_that_is_not_empty_is_refused(tmp_path, run):
    recipe = write_recipe(tmp_path, PLAIN)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").touch()
    code, _, last = run("assemble", recipe, "-o", tmp_path / "o")
    assert (code, "not empty" in last) == (2, True)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["mine"]


def test_weights_none_takes_the_architectures_alone(tmp_path, run):
    recipe = write_recipe(tmp_path, 'weights = "none"\n' + PLAIN)
    zoo = tmp_path / "zoo.toml"
    zoo.write_text(zoo.read_text().replace('name = "vit"', 'name = "vit"\nweights = "nowhere.safetensors"'))
    assert built(recipe)[0].zoo["vit"].weights is None
    recipe.write_text(PLAIN)
    code, _, last = run("assemble", recipe, "-o", tmp_path / "o")
    assert (code, "nowhere.safetensors" in last) == (2, True)
