"""Reading recipes: what is written wrong is one sentence that names file, table and key."""

from __future__ import annotations

import pytest

from derc.errors import UsageError
from derc.recipe import read_recipe
from tests.recipes import STITCHED

BLOCK = '[[block]]\ndonor = "a"\nfirst = "layer1.0"\nlast = 3\n'


def written(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_is_read_with_its_defaults(tmp_path):
    (tmp_path / "zoo.toml").touch()
    recipe = read_recipe(written(tmp_path, STITCHED))
    assert recipe.zoo == str(tmp_path / "zoo.toml")
    assert [(b.stitch, b.stride, b.grid) for b in recipe.block] == [
        (None, 1, "donor"),
        ("dery", 1, "donor"),
        ("dery-fc", 1, "donor"),
        ("dery", 2, "donor"),
        ("dery", 1, "keep"),
    ]
    assert (recipe.stem.kind, recipe.stem.channels, recipe.head.classes, recipe.weights) == ("conv7x7", 64, 5, "donor")


@pytest.mark.parametrize(("given", "size"), [("224", (224, 224)), ("[32, 48]", (32, 48))])
def test_the_image_size_is_a_side_or_a_pair(tmp_path, given, size):
    recipe = read_recipe(written(tmp_path, f'zoo = "timm:resnet18"\nimage_size = {given}\n{BLOCK}'))
    assert recipe.size == size
    assert recipe.zoo == "timm:resnet18"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no blocks: write a [[block]] table"),
        ("zoo = = 1", "is not valid TOML"),
        ("zo = 1\n" + BLOCK, "top level: unknown key 'zo', known: zoo, weights"),
        ("block = 3", "top level: block must be [[block]] tables, not 3"),
        ("stem = 3\n" + BLOCK, "stem must be a table, not 3"),
        (BLOCK.replace("last = 3\n", ""), "block 1: the key 'last' is missing"),
        (BLOCK + BLOCK.replace("3", "3.5"), "block 2: last must be a unit number or a module path, not 3.5"),
        (BLOCK + "laster = 1\n", "block 1: unknown key 'laster'"),
        (
            BLOCK + BLOCK + 'stitch = "derry"\n',
            "block 2: stitch must be 'linear', 'dery' or 'dery-fc', not 'derry'; did",
        ),
        (BLOCK + 'stitch = "dery"\n', "block 1: a stitch before the first block needs a fresh stem"),
        (BLOCK + BLOCK + "stride = 2\n", 'block 2: stride is for stitch = "dery"'),
        (BLOCK + BLOCK + 'stitch = "dery"\nstride = 0\n', "block 2: stride must be greater than or equal to 1, not 0"),
        (BLOCK + 'grid = "any"\n', "block 1: grid must be 'donor' or 'keep', not 'any'"),
        (BLOCK + '[stem]\nkind = "conv"\n', "[stem]: kind must be 'donor' or 'conv7x7', not 'conv'; did you mean"),
        (BLOCK + '[stem]\nkind = "conv7x7"\nchannels = 0\n', "[stem]: channels must be greater than or equal to 1"),
        (BLOCK + '[head]\nkind = "linear"\nclasses = 0\n', "[head]: classes must be greater than or equal to 1, not 0"),
        (BLOCK + '[head]\nkind = "linear"\n', "[head]: a linear head needs its number of classes"),
        (BLOCK + "[head]\nclasses = 10\n", '[head]: classes is for kind = "linear"'),
        ('weights = "some"\n' + BLOCK, "top level: weights must be 'donor' or 'none', not 'some'"),
        ("image_size = [1]\n" + BLOCK, "image_size must be a positive number or [height, width], not [1]"),
        ("image_size = 0\n" + BLOCK, "image_size must be a positive number or [height, width], not 0"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read: No such file"):
        read_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not valid TOML"):
        read_recipe(tmp_path / "binary.toml")
