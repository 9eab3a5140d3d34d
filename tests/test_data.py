from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from derc.data import Data, label_map, rest_indices, split_indices
from derc.donor import Donor
from derc.errors import UsageError
from derc.zoo import Zoo

SIZE = (3, 16, 16)


def write_images(folder: Path, count: int, size: tuple[int, int] = (20, 18), mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for number in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{number:03}.png")


def refused(spec: str, *words: str, **options) -> None:
    with pytest.raises(UsageError) as caught:
        Data.load(spec, **({"input_size": SIZE} | options))
    for word in words:
        assert word in str(caught.value)


def as_set(split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_digits():
    data = Data.load("digits")
    assert data.classes == tuple("0123456789")
    assert [len(data.probe), len(data.validation), len(data.heldout)] == [300, 300, 297]
    assert data.probe.images.shape == (300, 32, 32, 3)
    assert len(Data.load("digits", probe=64).probe) == 64
    assert Data.load("digits", input_size=(1, 8, 8)).probe.images.shape == (300, 8, 8, 1)


def test_batches():
    split = Data.load("digits").validation
    batches = list(split.batches(128))
    assert [len(images) for images, _ in batches] == [128, 128, 44]
    images, labels = batches[0]
    assert images.shape == (128, 3, 32, 32) and str(images.dtype) == "torch.float32"
    assert images.min() >= 0 and images.max() == 1
    assert np.array_equal(images[5, 0].numpy() * 255, split.images[5, :, :, 0])
    assert labels is not None and np.array_equal(labels.numpy(), split.labels[:128])


@given(count=st.integers(16, 400), probe=st.integers(8, 512), seed=st.integers(0, 9), kinds=st.integers(0, 5))
def test_splits_are_disjoint_cover_and_keep_the_classes_shares(count, probe, seed, kinds):
    labels = np.random.default_rng(seed).integers(0, kinds, count) if kinds else None
    parts = split_indices(labels, count, probe, seed)
    assert sorted(np.concatenate(parts)) == list(range(count))
    assert len(parts[0]) == min(probe, count // 2) and 0 <= len(parts[2]) - len(parts[1]) <= 1
    assert all(map(np.array_equal, parts, split_indices(labels, count, probe, seed)))
    if labels is not None:
        for label in range(kinds):
            expected = (labels == label).mean() * len(parts[0])
            assert abs((labels[parts[0]] == label).sum() - expected) <= 2


@given(count=st.integers(16, 9000), probe=st.integers(8, 512), seed=st.integers(0, 9), kinds=st.integers(0, 5))
def test_what_the_splits_leave_over_is_all_the_rest(count, probe, seed, kinds):
    labels = np.random.default_rng(seed).integers(0, kinds, count) if kinds else None
    splits, rest = split_indices(labels, count, probe, seed), rest_indices(labels, count, probe, seed)
    assert np.array_equal(np.sort(np.concatenate([*splits, rest])), np.arange(count))


def test_training_images_are_the_probes_and_the_rest_and_never_others(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (4300, 16, 16, 3), dtype=np.uint8), rng.integers(0, 3, 4300)
    np.savez(tmp_path / "many.npz", x=x, y=y)
    data = Data.load(f"npz:{tmp_path / 'many.npz'}", input_size=SIZE, probe=100)
    every = data.training(10**6)
    assert len(every) == len(as_set(every)) == 300
    assert not as_set(every) & (as_set(data.validation) | as_set(data.heldout))
    label = {image.tobytes(): kind for image, kind in zip(x, y, strict=True)}
    assert every.labels is not None and [label[i.tobytes()] for i in every.images] == list(every.labels)
    assert np.array_equal(data.training(150).images, every.images[:150])
    assert np.array_equal(data.training(40).images, data.probe.images[:40])


def test_digits_have_images_beyond_their_splits():
    data = Data.load("digits", probe=64)
    every = data.training(5000)
    assert len(every) == 64 + 900
    assert not as_set(every) & (as_set(data.validation) | as_set(data.heldout))


def test_folder_of_classes(tmp_path):
    write_images(tmp_path / "cat", 20)
    write_images(tmp_path / "dog", 12, mode="L")
    data = Data.load(f"folder:{tmp_path}", input_size=SIZE, probe=10)
    assert data.classes == ("cat", "dog")
    assert [len(data.probe), len(data.validation), len(data.heldout)] == [10, 11, 11]
    assert data.probe.images.shape == (10, 16, 16, 3) and data.probe.images.dtype == np.uint8
    assert not (as_set(data.probe) | as_set(data.validation)) & as_set(data.heldout)


def test_folder_of_images_has_no_labels(tmp_path):
    write_images(tmp_path, 20)
    (tmp_path / "notes.txt").write_text("not an image")
    data = Data.load(f"folder:{tmp_path}", input_size=(1, 16, 16))
    assert data.classes is None and data.probe.labels is None
    assert data.probe.images.shape == (10, 16, 16, 1)
    assert next(data.probe.batches(4))[1] is None


def test_images_are_fitted_and_cropped_not_squeezed(tmp_path):
    for number in range(16):
        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:, 8:24] = 200
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    assert (Data.load(f"folder:{tmp_path}", input_size=SIZE).probe.images == 200).all()


def test_the_number_of_decoded_images_is_capped(tmp_path):
    x = np.zeros((5000, 2, 2, 1), np.uint8)
    np.savez(tmp_path / "d.npz", x=x)
    data = Data.load(f"npz:{tmp_path / 'd.npz'}", input_size=(3, 2, 2), probe=100)
    assert [len(data.probe), len(data.validation), len(data.heldout)] == [100, 2000, 2000]


def test_bad_folders(tmp_path):
    refused(f"folder:{tmp_path / 'none'}", "does not exist")
    refused(f"folder:{tmp_path}", "no images")
    write_images(tmp_path / "a", 20)
    (tmp_path / "b").mkdir()
    refused(f"folder:{tmp_path}", "class folder b has no images")
    write_images(tmp_path / "b", 2)
    refused(f"folder:{tmp_path}", "too few", probe=4)
    write_images(tmp_path, 1)
    refused(f"folder:{tmp_path}", "mixes")
    refused(f"folder:{tmp_path / 'b'}", "has 2 images")
    refused(f"folder:{tmp_path / 'b'}", "4", input_size=(4, 8, 8))


def test_an_unreadable_image_is_named(tmp_path):
    write_images(tmp_path, 16)
    whole = (tmp_path / "003.png").read_bytes()
    (tmp_path / "003.png").write_bytes(whole[: len(whole) // 2])
    refused(f"folder:{tmp_path}", "003.png", "cannot be read")


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 16, 16, 1), dtype=np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "d.npz", x=x, y=y)
    data = Data.load(f"npz:{tmp_path / 'd.npz'}", input_size=SIZE, probe=20)
    assert data.classes == ("0", "1", "2", "3")
    assert np.bincount(data.probe.labels).tolist() == [5, 5, 5, 5]
    assert {image[:, :, :1].tobytes() for image in data.probe.images} < {image.tobytes() for image in x}
    assert Data.load(f"npz:{tmp_path / 'd.npz'}", input_size=(3, 24, 20)).probe.images.shape == (20, 24, 20, 3)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros(3)}, ("no array x", "images")),
        ({"x": np.zeros((20, 8, 8), np.uint8)}, ("(N, H, W, C)", "(20, 8, 8)")),
        ({"x": np.zeros((20, 8, 8, 3), np.float32)}, ("uint8", "float32")),
        ({"x": np.zeros((0, 8, 8, 3), np.uint8)}, ("no images",)),
        ({"x": np.zeros((20, 8, 8, 4), np.uint8)}, ("4 channels",)),
        ({"x": np.zeros((20, 8, 8, 3), np.uint8), "y": np.zeros(19, int)}, ("y must be 20",)),
        ({"x": np.zeros((20, 8, 8, 3), np.uint8), "y": np.zeros(20)}, ("y must be 20",)),
        ({"x": np.zeros((20, 8, 8, 3), np.uint8), "y": np.full(20, -1)}, ("y must be 20",)),
        ({"x": np.array([{}], object)}, ("pickled",)),
    ],
)
def test_bad_npz(tmp_path, arrays, words):
    np.savez(tmp_path / "d.npz", **arrays)
    refused(f"npz:{tmp_path / 'd.npz'}", "d.npz", *words)


def test_bad_npz_files(tmp_path):
    refused(f"npz:{tmp_path / 'none.npz'}", "does not exist")
    (tmp_path / "d.npz").write_text("hello")
    refused(f"npz:{tmp_path / 'd.npz'}", "not a readable npz")
    np.savez(tmp_path / "e.npz", x=np.random.default_rng(0).integers(0, 9, (20, 8, 8, 3), dtype=np.uint8))
    content = (tmp_path / "e.npz").read_bytes()
    (tmp_path / "e.npz").write_bytes(content[: len(content) // 2])
    refused(f"npz:{tmp_path / 'e.npz'}", "not a readable npz")
    np.save(tmp_path / "f.npz.npy", np.zeros(3))
    refused(f"npz:{tmp_path / 'f.npz.npy'}", "not a readable npz")


@pytest.mark.parametrize(
    ("spec", "word"), [("digit", "'digits'"), ("foldr:x", "'folder'"), ("folder:", "unknown data")]
)
def test_unknown_data(spec, word):
    refused(spec, word)


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (("cat", "dog"), ("dog", "cat"), (1, 0)),
        (("Sea_Lion", "cat", "dog"), ("dog", "sea lion"), (2, 0)),
        (("0", "1"), ("cat", "dog"), (0, 1)),
        (("cat", "dog"), ("0", "1"), (0, 1)),
        (("0", "1", "2"), ("0", "2"), (0, 2)),
        (("even", "odd"), ("cat", "dog"), None),
        (("cat", "cow"), ("cat", "dog"), None),
        (("even", "odd"), tuple("0123456789"), None),
        (None, ("cat", "dog"), None),
    ],
)
def test_label_map(labels, classes, expected):
    assert label_map(labels, classes) == expected


@given(names=st.lists(st.text("abcdef", min_size=1), min_size=1, unique=True), seed=st.randoms())
def test_label_map_by_name_finds_each_class(names, seed):
    shuffled = names.copy()
    seed.shuffle(shuffled)
    found = label_map(tuple(names), tuple(shuffled))
    assert found is not None and [names[index] for index in found] == shuffled


def zoo_of(*labels: tuple[str, ...] | None) -> Zoo:
    return Zoo("z", tuple(Donor(f"d{i}", "timm:resnet18", labels=label) for i, label in enumerate(labels)))


def test_task_donors(tmp_path):
    ten, two = tuple("0123456789"), ("even", "odd")
    data = Data.load("digits")
    assert data.task_donors(zoo_of(two, ten, None, ten)) == ("d1", "d3")
    assert data.task_donors(zoo_of(two)) == ()
    write_images(tmp_path, 16)
    bare = Data.load(f"folder:{tmp_path}", input_size=SIZE)
    assert bare.task_donors(zoo_of(two, ten, ten)) == ("d1", "d2")
    assert bare.task_donors(zoo_of(two, ten)) == ("d0",)
    assert bare.task_donors(zoo_of(None, None)) == ("d0",)


def test_digest_covers_probe_and_validation_and_not_heldout(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8), np.arange(40) % 2
    parts = split_indices(y, 40, 16, 0)

    def digest_with(changed: int | None) -> str:
        pixels = x.copy()
        if changed is not None:
            pixels[changed] ^= 1
        np.savez(tmp_path / "d.npz", x=pixels, y=y)
        return Data.load(f"npz:{tmp_path / 'd.npz'}", input_size=(3, 4, 4), probe=16).digest()

    plain = digest_with(None)
    assert plain == digest_with(None) == digest_with(parts[2][0])
    assert plain != digest_with(parts[0][0])
    assert plain != digest_with(parts[1][0])
