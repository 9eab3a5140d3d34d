"""Small networks that tests lower, cut and stitch."""

from __future__ import annotations

import timm
import torch
from torch import nn

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "resnet": ("resnet18", {"channels": (8, 12, 16, 24), "stem_width": 8}),
    "regnet": ("regnetx_002", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "ghostnet": ("ghostnet_050", {"drop_rate": 0.2}),
    "convnext": ("convnext_atto", {"dims": (8, 12, 16, 24), "depths": (1, 1, 2, 1)}),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 4}),
    "registers": (
        "vit_tiny_patch16_224",
        {
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 3,
            "img_size": 32,
            "patch_size": 4,
            "reg_tokens": 4,
            "drop_path_rate": 0.3,
        },
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "img_size": 32, "patch_size": 2, "window_size": 4},
    ),
}


def make(family: str, seed: int = 0) -> nn.Module:
    """A network of the family for 32×32 images and ten classes, batch-norm statistics randomised, in eval mode."""
    name, options = FAMILIES[family]
    torch.manual_seed(seed)
    network: nn.Module = timm.create_model(name, num_classes=10, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def images(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Functional(nn.Module):
    """No children in a row: functional calls, a shared parameter, shape arithmetic and an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        assert h % 4 == 0 and w % 4 == 0
        x = torch.relu(self.conv(x) * self.scale)
        y = torch.relu_(self.mix(x))
        x = (x + y * self.scale).reshape(n, 8, (h // 4) * 4, w)
        x = x.reshape(n * 2, 4, h, w).reshape(n, -1, h, w)
        return self.fc(x.mean((2, 3)).view(n, 8))


class DataDependent(nn.Module):
    """Branches on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3))
        return y if y.sum() > 0 else -y
