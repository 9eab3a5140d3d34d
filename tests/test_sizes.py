"""Donors of different native sizes meet at one: convolutions as they are, position tables and windows rebuilt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vision_transformer

from derc.artifacts import Assembly, BlockRef
from derc.config import resolve
from derc.console import Console
from derc.donor import Donor
from derc.emitted import realise
from derc.errors import UsageError
from derc.passes.cut import find_cuts
from derc.passes.lower import lower
from derc.printing import print_network
from derc.sizes import at_size, meet
from derc.workspace import load_zoo, open_data
from derc.zoo import Zoo

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32, "num_classes": 5}
SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 2, "window_size": 4, "num_classes": 5}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 32}),
    "swinv2": ("swinv2_tiny_window8_256", SWIN | {"img_size": 32}),
    "beit": ("beit_base_patch16_224", VIT),
    "resnet": ("resnet18", {"channels": [8, 8, 8, 8], "num_classes": 5}),
}
TOKENS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
TOKENS |= {"image_size": 32, "patch_size": 8, "num_labels": 5}


def timm_network(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(3)
    architecture, kwargs = NETWORKS[name]
    network: nn.Module = timm.create_model(architecture, **kwargs | more)
    return randomised(network)


def randomised(network: nn.Module) -> nn.Module:
    """With position tables and biases of a size that matters."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def donor(folder: Path, name: str) -> Donor:
    architecture, kwargs = NETWORKS[name]
    save_file(timm_network(name).state_dict(), folder / f"{name}.safetensors")
    return Donor(name, f"timm:{architecture}", kwargs, weights=folder / f"{name}.safetensors", input_size=(3, 32, 32))


@pytest.mark.parametrize("size", [(48, 48), (64, 32)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_timm_network_at_another_size_is_what_timm_makes_of_its_weights(tmp_path, name, size):
    made = at_size(donor(tmp_path, name), size)
    architecture, kwargs = NETWORKS[name]
    assert made.input_size == (3, *size) and (made.native is None) == (name == "resnet")
    resized = {} if name == "resnet" else {"img_size": size}
    overlay = {"file": str(tmp_path / f"{name}.safetensors"), "num_classes": 5}
    want = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs | resized).eval()
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(made.build()(x), want(x))
    assert made.digest() != donor(tmp_path, name).digest()


def test_different_donors_meet_and_print_at_the_new_size(tmp_path):
    kept, left = meet([donor(tmp_path, name) for name in ("vit", "swin", "resnet")], (48, 48))
    assert [one.name for one in kept] == ["vit", "swin", "resnet"] and not left
    for one in kept:
        network = one.build()
        lowered = lower(network, one.input_size, name=one.name)
        lowered = lowered.with_cuts(find_cuts(lowered.graph))
        whole = Assembly((BlockRef(one.name, 0, len(lowered.units), 0),))
        printed = print_network(whole, {one.name: one}, {one.name: lowered}, [])
        x = torch.rand(2, 3, 48, 48)
        with torch.no_grad():
            assert torch.equal(realise(printed)(x), network(x))


def test_a_transformers_position_table_is_what_transformers_interpolates(tmp_path):
    torch.manual_seed(3)
    native: Any = randomised(transformers.ViTForImageClassification(transformers.ViTConfig(**TOKENS)))
    save_file(native.state_dict(), tmp_path / "w.safetensors")
    factory = "transformers:ViTForImageClassification"
    one = Donor("d", factory, TOKENS, weights=tmp_path / "w.safetensors", input_size=(3, 32, 32))
    x = torch.rand(2, 3, 48, 64)
    made = at_size(one, (48, 64))
    assert made.kwargs["image_size"] == [48, 64]
    with torch.no_grad():
        torch.testing.assert_close(made.build()(x), native(x, interpolate_pos_encoding=True).logits)


def test_a_torchvision_position_table_is_what_torchvision_interpolates(tmp_path):
    torch.manual_seed(3)
    arguments = {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 5}
    native = randomised(vision_transformer.VisionTransformer(image_size=32, **arguments))
    target = vision_transformer.VisionTransformer(image_size=48, **arguments)
    from derc.resampling import resampled

    state = resampled("torchvision:vit_b_16", {}, native, target)
    want = vision_transformer.interpolate_embeddings(48, 8, native.state_dict())
    assert all(torch.equal(state[name], value) for name, value in want.items())


def test_those_that_cannot_are_left_out_with_the_reason(tmp_path):
    (tmp_path / "size_test_nets.py").write_text(
        "from torch import nn\ndef fixed(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))\n"
    )
    fixed = 'name = "fixed"\nfactory = "size_test_nets:fixed"\ninput_size = [3, 32, 32]\n'
    free = 'name = "free"\nfactory = "timm:test_resnet"\nkwargs = { num_classes = 5 }\ninput_size = [3, 160, 160]\n'
    stages = "hidden_sizes = [8, 8, 8, 8], depths = [1, 1, 1, 1], num_attention_heads = [1, 1, 2, 2], image_size = 64"
    table = (
        f'name = "table"\nfactory = "transformers:PvtForImageClassification"\nkwargs = {{ {stages} }}\n'
        "input_size = [3, 64, 64]\n"
    )
    path = tmp_path / "zoo.toml"
    try:
        path.write_text("".join(f"[[donor]]\n{table}" for table in (fixed, free, table)))
        zoo = Zoo.load(str(path), input_size=(96, 96))
        assert zoo.names == ("free",) and zoo["free"].input_size == (3, 96, 96)
        assert "shapes cannot be multiplied" in zoo.left_out["fixed"]
        assert "transformers cannot resample its weights" in zoo.left_out["table"]
        with pytest.raises(UsageError, match=r"no donor takes images of 1x48x48.*3 channels.*another --input-size"):
            Zoo.load(str(path), input_size=(1, 48, 48))
    finally:
        sys.modules.pop("size_test_nets", None)


def test_a_donor_that_cannot_be_built_is_an_error_at_every_size():
    broken = Donor("broken", "timm:resnet18", {"depth": 3}, input_size=(3, 32, 32))
    with pytest.raises(UsageError, match=r"donor broken.*depth"):
        meet([broken, Donor("fine", "timm:test_resnet")], (48, 48))


def test_a_zoo_of_two_sizes_needs_one_and_says_what_it_leaves_out(tmp_path, capsys):
    (tmp_path / "zoo.toml").write_text(
        '[[donor]]\nname = "a"\nfactory = "timm:test_resnet"\ninput_size = [3, 64, 64]\n'
        '[[donor]]\nname = "b"\nfactory = "timm:mixer_s32_224"\ninput_size = [3, 224, 224]\n'
    )
    settings = resolve({"zoo": str(tmp_path / "zoo.toml")}, {}, None)
    with pytest.raises(UsageError, match=r"sizes differ \(a \(3, 64, 64\), b \(3, 224, 224\)\): give --input-size"):
        open_data(settings, load_zoo(settings, Console()), Console())
    settings = settings.model_copy(update={"input_size": "64x64"})
    zoo = load_zoo(settings, Console())
    assert zoo.names == ("a",) and "donor b is left out: " in capsys.readouterr().err
    assert open_data(settings, zoo, Console()).probe.images.shape[1:] == (64, 64, 3)
