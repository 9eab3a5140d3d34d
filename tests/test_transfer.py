"""Labels that no donor knows, from the command down: what is refused and why, and one whole compile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import derc
from derc import bundle
from derc.console import Console
from derc.data import Data, Split
from derc.digits import load_all
from derc.errors import UsageError
from derc.pipeline import Timings
from derc.summary import told
from derc.transfer import with_heads
from tests.conftest import KEPT, small_zoo
from tests.world import make_context

CLASSES = ("low", "high")


def relabelled(data: Data, labels, classes) -> Data:
    """The same images with other labels, a function of the old ones."""
    splits = [Split(s.images, labels(s.labels)) for s in (data.probe, data.validation, data.heldout)]
    return Data("other", classes, *splits)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    made = make_context(tmp_path_factory.mktemp("store"), "resnet", probe=64)
    return replace(made, data=relabelled(made.data, lambda y: (y >= 5).astype(np.int64), CLASSES))


class Heard(Console):
    """A console that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def refused(context, mode="auto"):
    with pytest.raises(UsageError) as error:
        with_heads([context], mode, Timings())
    assert error.value.exit_code == 2
    return str(error.value)


def test_one_class_is_refused(context):
    one = relabelled(context.data, lambda y: 0 * y, ("low",))
    assert "have one class only, low: add images of another" in refused(replace(context, data=one))


def test_a_class_with_one_image_is_refused_by_name(context):
    def rare(labels):
        found = np.zeros_like(labels)
        found[0] = 1
        return found

    data = relabelled(context.data, rare, CLASSES)
    assert "class high has 1 of the 64 images to fit a head to and needs 2: raise --probe" in refused(
        replace(context, data=data)
    )


def test_a_class_without_images_is_refused_by_name(context):
    data = relabelled(context.data, lambda y: y, ("low", "high", "absent"))
    assert "class absent has 0 of the 64 images" in refused(replace(context, data=data))


def test_fitting_needs_labels(context):
    bare = Data("bare", None, *(replace(s, labels=None) for s in (context.data.probe,) * 3))
    assert "--head fit needs labels" in refused(replace(context, data=bare), "fit")


def test_donors_heads_alone_are_refused_where_none_fits(context):
    assert "no donor's labels fit the data's classes: add a donor" in refused(context, "donor")


def test_a_zoo_that_ends_in_no_linear_map_is_refused(context):
    module = context.lowered["resnet"].module
    before = module.fc
    try:
        module.fc = torch.nn.Sequential(before, torch.nn.Softmax(1))
        other = derc.lower(module, (3, 32, 32), name="resnet")
        assert "no donor ends in a linear map (resnet)" in refused(replace(context, lowered={"resnet": other}))
    finally:
        module.fc = before


def test_donors_heads_are_kept_where_one_fits(tmp_path):
    context = make_context(tmp_path, "resnet", probe=16)
    for mode in ("auto", "donor"):
        (same,) = with_heads([context], mode, Timings())
        assert same is context


def test_fit_takes_the_place_of_heads_that_fit_too(tmp_path):
    context = make_context(tmp_path, "resnet", probe=64)
    (fitted,) = with_heads([context], "fit", Timings())
    assert fitted.zoo["resnet"].head is not None and context.zoo["resnet"].head is None
    assert fitted.zoo["resnet"].labels == context.data.classes


def test_it_is_said_why_and_where_images_are_few(context):
    heard = Heard()
    few = replace(context.data, probe=Split(context.data.probe.images[:20], context.data.probe.labels[:20]))
    (fitted,) = with_heads([replace(context, data=few, console=heard)], "auto", Timings())
    assert fitted.zoo["resnet"].head.weight.shape == (2, 24)
    assert "heads for low, high are fitted to 20 images, because no donor's labels fit the data's" in heard.lines
    assert any(line.startswith("resnet: fewer images than features") for line in heard.lines)
    assert any(line.startswith("best of them: ") for line in heard.lines)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A compile of three donors for images that none was trained on: digits on their side, low or high."""
    folder = tmp_path_factory.mktemp("transfer")
    images, labels = load_all()
    for name, keep in zip(CLASSES, (labels < 5, labels >= 5), strict=True):
        write(folder / "data" / name, np.rot90(images[keep], axes=(1, 2))[:400])
    zoo = small_zoo(folder, *KEPT)
    result = derc.compile(
        str(zoo),
        f"folder:{folder / 'data'}",
        latency_ms=50.0,
        out=folder / "out",
        evaluations=3,
        probe=256,
        profile_s=2,
    )
    return folder, result


def write(folder, images):
    from PIL import Image

    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{number}.png")


def test_the_manifest_says_that_the_head_was_fitted_and_how(compiled):
    folder, result = compiled
    head = bundle.read(folder / "out")["head"]
    assert head["classes"] == ["high", "low"]
    assert set(head["donors"]) == set(KEPT)
    assert head["network"]["images"] == 256 and head["network"]["method"] in ("ridge", "logistic")
    assert head["network"]["validation"] == result["accuracy"]["validation"] > 0.7
    assert set(result["accuracy"]["donors"]) == set(KEPT)


def test_the_report_and_the_console_say_it_too(compiled):
    folder, _ = compiled
    manifest, page = bundle.read(folder / "out"), (folder / "out" / "report.html").read_text()
    method = manifest["head"]["network"]["method"]
    assert f"The head for high, low was fitted to 256 labelled images by {method} regression" in page
    paths = {"manifest.json": str(folder / "out" / "manifest.json")}
    assert f"head      fitted to 256 images by {method} regression" in told({**manifest, "artifacts": paths})


def test_it_is_never_below_the_best_donor_with_its_own_fitted_head(compiled):
    folder, result = compiled
    candidates = bundle.read(folder / "out")["candidates"]
    intact = [one["validation"] for one in candidates if one["intact"]]
    assert len(intact) == len(KEPT) and len(candidates) > len(KEPT)
    assert result["accuracy"]["validation"] >= max(intact)


def test_the_bundles_network_is_what_was_reported(compiled):
    folder, result = compiled
    bundle.verify(folder / "out")
    network = derc.load(folder / "out")
    data = Data.load(f"folder:{folder / 'data'}", probe=256)
    images, labels = next(iter(data.heldout.batches(1000)))
    with torch.no_grad():
        outputs = network(images)
    assert outputs.shape[1] == 2
    assert (outputs.argmax(1) == labels).float().mean().item() == pytest.approx(result["accuracy"]["heldout"], abs=1e-6)
    parity = bundle.read(folder / "out")["parity"]
    assert max(parity["module_onnx"], parity["onnx_engine"], parity["module_engine"]) <= parity["tolerance"]


def test_the_latency_is_measured_with_the_new_head(compiled):
    folder, result = compiled
    manifest = bundle.read(folder / "out")
    assert result["latency"]["provenance"] == "measured"
    assert all(one["cuts"][-1].endswith("NC2") for one in manifest["donors"].values())
    assert sum(p.numel() for p in derc.load(folder / "out").parameters()) == result["selected"]["params"]


def test_grey_images_do_for_colour_donors(tmp_path, context):
    images, labels = load_all()
    np.savez(tmp_path / "grey.npz", x=images, y=labels // 5)
    grey = Data.load(f"npz:{tmp_path / 'grey.npz'}", probe=64)
    (fitted,) = with_heads([replace(context, data=grey)], "fit", Timings())
    assert images.shape[3] == 1 and grey.probe.images.shape[3] == 3
    assert fitted.zoo["resnet"].head.weight.shape[0] == 2
