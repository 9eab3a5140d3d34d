"""Where training images come from: three parts without common images, read when they are asked for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from derc.data import Data
from derc.errors import UsageError
from derc.training.augment import Augmentation
from derc.training.data import load
from derc.training.examples import Batches

SIZE = (3, 16, 16)
RNG = np.random.default_rng(0)


def pictures(count: int, size: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_folder(folder, classes, count: int) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index, image in enumerate(pictures(count)):
            Image.fromarray(image).save(folder / name / f"{index}.png")


def as_set(examples) -> set[bytes]:
    return {image.tobytes() for image in examples.read(np.arange(len(examples)))}


def check_disjoint(data, total: int) -> None:
    parts = [as_set(part) for part in (data.train, data.validation, data.heldout)]
    assert sum(map(len, parts)) == len(parts[0] | parts[1] | parts[2]) == total
    for part in (data.train, data.validation, data.heldout):
        assert set(part.labels.tolist()) == set(range(len(data.classes)))


def test_a_folder_is_divided_and_holds_out_what_a_compile_does(tmp_path):
    write_folder(tmp_path, ("cat", "dog"), 60)
    data = load(f"folder:{tmp_path}", SIZE, seed=3)
    assert data.classes == ("cat", "dog") and len(data.validation) == 12
    check_disjoint(data, 120)
    compiled = Data.load(f"folder:{tmp_path}", input_size=SIZE, seed=3)
    assert as_set(data.heldout) == {image.tobytes() for image in compiled.heldout.images}
    assert as_set(data.validation) < {image.tobytes() for image in compiled.validation.images}
    assert np.array_equal(data.heldout.read(np.arange(3)), compiled.heldout.images[:3])


def test_a_folder_with_parts_keeps_them(tmp_path):
    for part, count in (("train", 40), ("val", 20)):
        write_folder(tmp_path / part, ("a", "b", "c"), count)
    data = load(f"folder:{tmp_path}", SIZE)
    check_disjoint(data, 180)
    assert (len(data.train), len(data.validation), len(data.heldout)) == (108, 12, 60)
    write_folder(tmp_path / "test", ("a", "b", "c"), 10)
    data = load(f"folder:{tmp_path}", SIZE)
    assert (len(data.train), len(data.validation), len(data.heldout)) == (120, 60, 30)
    write_folder(tmp_path / "test", ("e",), 1)
    with pytest.raises(UsageError, match="its part test has the classes a, b, c, e, and train has a, b, c"):
        load(f"folder:{tmp_path}", SIZE)


def test_images_are_decoded_when_asked_for_also_in_other_processes(tmp_path):
    write_folder(tmp_path, ("cat", "dog"), 30)
    data = load(f"folder:{tmp_path}", SIZE)
    chosen = int(data.train.indices[5])
    files = sorted((tmp_path / "cat").iterdir()) + sorted((tmp_path / "dog").iterdir())
    again = pickle.loads(pickle.dumps(data.train))  # noqa: S301
    files[chosen].write_bytes(b"no image any more")
    keep = np.array([index for index in range(len(data.train)) if index != 5])
    assert data.train.read(keep).shape[0] == again.read(keep).shape[0] == len(keep)
    with pytest.raises(UsageError, match="cannot be read"):
        data.train.read(np.array([5]))
    batches = Batches(again, 8, 0, Augmentation())
    with pytest.raises(UsageError, match="cannot be read"):
        list(batches.stream(0, batches.per_epoch + 6, 1))


@pytest.mark.parametrize("column", [False, True])
def test_an_npz_file_with_parts(tmp_path, column):
    x, y = pictures(130), np.arange(130) % 5
    y = y[:, None] if column else y
    np.savez(tmp_path / "d.npz", x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    data = load(f"npz:{tmp_path / 'd.npz'}", SIZE)
    check_disjoint(data, 130)
    assert as_set(data.heldout) == {image.tobytes() for image in x[100:]} and len(data.validation) == 10
    label = {image.tobytes(): int(kind) for image, kind in zip(x, y.ravel(), strict=True)}
    images = data.train.read(np.arange(len(data.train)))
    assert [label[image.tobytes()] for image in images] == data.train.labels.tolist()


def test_an_npz_file_that_is_whole(tmp_path):
    np.savez(tmp_path / "d.npz", x=pictures(80, size=20), y=np.arange(80) % 2)
    data = load(f"npz:{tmp_path / 'd.npz'}", SIZE)
    check_disjoint(data, 80)
    assert data.train.read(np.arange(2)).shape == (2, 16, 16, 3)


def test_a_local_hugging_face_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    x, y = pictures(90), np.arange(90) % 3
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})

    def made(start, stop):
        rows = {"image": [Image.fromarray(image) for image in x[start:stop]], "label": y[start:stop].tolist()}
        return datasets.Dataset.from_dict(rows, features=features)

    made(0, 90).save_to_disk(tmp_path / "whole")
    whole = load(f"hf:{tmp_path / 'whole'}", SIZE)
    check_disjoint(whole, 90)
    assert whole.classes == ("a", "b", "c")
    datasets.DatasetDict({"train": made(0, 60), "test": made(60, 90)}).save_to_disk(tmp_path / "parts")
    parts = load(f"hf:{tmp_path / 'parts'}", SIZE)
    check_disjoint(parts, 90)
    assert as_set(parts.heldout) == {image.tobytes() for image in x[60:]}
    compiled = Data.load(f"hf:{tmp_path / 'parts'}", input_size=SIZE, probe=10)
    assert compiled.classes == ("a", "b", "c") and len(compiled.probe) == 10
    assert {i.tobytes() for i in compiled.heldout.images} < {image.tobytes() for image in x[60:]}
    made(0, 90).remove_columns("label").save_to_disk(tmp_path / "none")
    with pytest.raises(UsageError, match="no column of class indices"):
        load(f"hf:{tmp_path / 'none'}", SIZE)
    with pytest.raises(UsageError, match="is not a data set that save_to_disk"):
        load(f"hf:{tmp_path}", SIZE)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:gone", "does not exist"),
        ("fodler:gone", "did you mean 'folder'"),
        ("npz:gone.npz", "does not exist"),
        ("hf:gone", "does not exist"),
        ("digit", "did you mean 'digits'"),
    ],
)
def test_what_is_not_there_is_said(spec, message):
    with pytest.raises(UsageError, match=message):
        load(spec, SIZE)


def test_too_few_images_or_none_with_labels_are_refused(tmp_path):
    np.savez(tmp_path / "few.npz", x=pictures(6), y=np.arange(6) % 2)
    np.savez(tmp_path / "none.npz", x=pictures(60))
    with pytest.raises(UsageError, match="has 6 images, at least 16 are needed"):
        load(f"npz:{tmp_path / 'few.npz'}", SIZE)
    with pytest.raises(UsageError, match="no labels"):
        load(f"npz:{tmp_path / 'none.npz'}", SIZE)


def test_digits_share_no_images_between_parts():
    data = load("digits", SIZE)
    assert (len(data.train), len(data.validation), len(data.heldout)) == (1200, 300, 297)
    assert not as_set(data.train) & as_set(data.heldout)
