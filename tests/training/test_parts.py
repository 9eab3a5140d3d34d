"""What a training is made of: augmentation, loss, freezing, and checkpoints."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from derc.errors import IntegrityError, UsageError
from derc.training.augment import Augmentation
from derc.training.checkpoint import STATE, Work
from derc.training.freeze import Freeze
from derc.training.loss import Loss
from tests.training.small import same

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)


def test_nothing_is_augmented_unless_asked():
    assert np.array_equal(Augmentation.parse("")(IMAGES, np.random.default_rng(0)), IMAGES)
    assert Augmentation.parse("none") == Augmentation()


def test_a_flip_mirrors_some_and_leaves_the_others():
    found = Augmentation.parse("flip")(IMAGES, np.random.default_rng(1))
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(found, IMAGES, strict=True)]
    assert any(mirrored) and not all(mirrored)
    assert all(m or np.array_equal(a, b) for m, a, b in zip(mirrored, found, IMAGES, strict=True))


@given(size=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_crop_shows_the_image_moved(size, seed):
    found = Augmentation(crop=size)(IMAGES, np.random.default_rng(seed))
    mode = "reflect" if size < 10 else "edge"
    assert found.shape == IMAGES.shape
    for image, moved in zip(IMAGES, found, strict=True):
        padded = np.pad(image, ((size, size), (size, size), (0, 0)), mode=mode)
        windows = np.lib.stride_tricks.sliding_window_view(padded, image.shape).reshape(-1, *image.shape)
        assert (windows == moved).all((1, 2, 3)).any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("text", ["zoom=0.3", "rand-m9-mstd0.5", "flip,crop=2,zoom=0.5,rand-m5-n1"])
def test_what_pil_draws_keeps_its_shape_and_every_global_random_state(text, channels):
    images, states = IMAGES[..., :channels], (random.getstate(), np.random.get_state()[1].tolist())
    first, again = (Augmentation.parse(text)(images, np.random.default_rng(4)) for _ in range(2))
    assert first.shape == images.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, images)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


@given(seed=st.integers(0, 99), share=st.floats(0, 1), heat=st.floats(0.5, 8))
def test_the_loss_is_hintons(seed, share, heat):
    rng = np.random.default_rng(seed)
    z, v, y = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), rng.integers(0, 4, 5)

    def softened(x, t):
        e = np.exp(x / t - (x / t).max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    cross = -np.log(softened(z, 1)[range(5), y]).mean()
    p = softened(v, heat)
    divergence = heat**2 * (p * (np.log(p) - np.log(softened(z, heat)))).sum(1).mean()
    made = Loss(share=share, temperature=heat)
    total, labels, teacher = made(torch.tensor(z), torch.tensor(y), torch.tensor(v))
    assert float(labels) == pytest.approx(cross, rel=1e-4) and float(teacher) == pytest.approx(divergence, rel=1e-3)
    assert float(total) == pytest.approx((1 - share) * cross + share * divergence, rel=1e-3)


def test_freezing_knows_its_words():
    with pytest.raises(UsageError, match=r"--freeze 'block' is unknown.*did you mean 'blocks'"):
        Freeze("block")
    with pytest.raises(UsageError, match="does not end in a linear layer"):
        Freeze("all-but-head")
    assert [Freeze("blocks")(path) for path in ("block0.fc", "stitch1.linear", "stem.conv", "head.linear")] == [
        False,
        True,
        True,
        True,
    ]


def state(seed: int) -> dict:
    torch.manual_seed(seed)
    weight = torch.randn(3, 2).T
    return {"w": {"a": weight, "tied": weight}, "o": {0: {"step": torch.tensor(3.0), "x": [1, None]}}, "f": 0.1 + 0.2}


def test_a_checkpoint_comes_back_as_it_was_and_replaces_the_one_before(tmp_path):
    work = Work(tmp_path / "w", {"lr": 1})
    work.open()
    assert work.load() is None
    for seed in range(3):
        work.save(state(seed))
    found, wanted = work.load(), state(2)
    assert same(found["w"], wanted["w"]) and found["o"][0]["step"] == 3 and found["o"][0]["x"] == [1, None]
    assert found["f"] == 0.1 + 0.2
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["command.json", "state-2.safetensors", STATE]


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    """Whatever a kill leaves between two writes, the last whole state is there."""
    work = Work(tmp_path / "w", {})
    work.open()
    work.save(state(0))
    (tmp_path / "w" / "state-1.safetensors.part").write_bytes(b"half")
    (tmp_path / "w" / "state-1.safetensors").write_bytes(b"not yet named")
    (tmp_path / "w" / f"{STATE}.part").write_text("{")
    assert same(work.load()["w"], state(0)["w"])
    work.save(state(1))
    assert same(work.load()["w"], state(1)["w"])
    assert not (tmp_path / "w" / "state-1.safetensors.part").exists()


def test_another_command_or_process_or_damage_is_refused(tmp_path):
    work = Work(tmp_path / "w", {"lr": 1, "seed": 0})
    work.open()
    with pytest.raises(UsageError, match="another process is training in"):
        Work(tmp_path / "w", {"lr": 1, "seed": 0}).open()
    work.save(state(0))
    work.close()
    with pytest.raises(UsageError, match=r"another command began \(lr differ\)"):
        Work(tmp_path / "w", {"lr": 2, "seed": 0}).open()
    work.open()
    name = json.loads((tmp_path / "w" / STATE).read_text())["tensors"]
    (tmp_path / "w" / name).write_bytes(b"x" * 50)
    with pytest.raises(IntegrityError, match="is damaged"):
        work.load()
