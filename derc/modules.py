"""The modules that derc itself adds to a network; their source is written into every bundle's model.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Normalize(nn.Module):
    """(x - mean) / std per channel; x is (N, C, H, W) in [0, 1]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


class Stitch(nn.Module):
    """Joins two blocks: regrids, maps the channels linearly and changes the layout.

    `source` and `target` are (layout, channels, prefix tokens, (height, width) or None). Pooling comes before
    the linear map, enlarging after it. Prefix (class, register) tokens of the target are a linear map of the source's
    mean and prefix tokens.
    """

    def __init__(
        self,
        source: tuple[str, int, int, tuple[int, int] | None],
        target: tuple[str, int, int, tuple[int, int] | None],
    ) -> None:
        super().__init__()
        self.source_layout, channels, self.source_prefix, self.source_grid = source
        self.target_layout, width, self.target_prefix, self.target_grid = target
        self.linear = nn.Linear(channels, width)
        tokens = 1 + self.source_prefix
        self.prefix = nn.Linear(tokens * channels, self.target_prefix * width) if self.target_prefix else None

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The source as a map (N, C, H, W) and a summary (N, (1 + prefix) * C): its mean, then its prefix tokens."""
        if self.source_layout == "NC":
            return x[:, :, None, None], x
        if self.source_layout == "NLC":
            tokens = x[:, self.source_prefix :]
            summary = torch.cat([tokens.mean(1, keepdim=True), x[:, : self.source_prefix]], 1).flatten(1)
            height, width = self.source_grid or (tokens.shape[1], 1)
            return tokens.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width), summary
        if self.source_layout == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return x, x.mean((2, 3))

    def regrid(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Resize (N, C, H, W) to `grid`: average pooling where it divides evenly, else bilinear."""
        height, width = x.shape[2], x.shape[3]
        if (height, width) == grid:
            return x
        if height % grid[0] == 0 and width % grid[1] == 0:
            return F.avg_pool2d(x, (height // grid[0], width // grid[1]))
        return F.interpolate(x, size=grid, mode="bilinear", align_corners=False)

    def map(self, x: torch.Tensor) -> torch.Tensor:
        """The linear map of the channels of (N, C, H, W)."""
        return F.conv2d(x, self.linear.weight[:, :, None, None], self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, summary = self.split(x)
        if self.target_layout == "NC":
            pooled: torch.Tensor = self.linear(x.mean((2, 3)))
            return pooled
        grid = self.target_grid or (x.shape[2], x.shape[3])
        shrinks = grid[0] * grid[1] <= x.shape[2] * x.shape[3]
        x = self.map(self.regrid(x, grid)) if shrinks else self.regrid(self.map(x), grid)
        if self.target_layout == "NCHW":
            return x
        if self.target_layout == "NHWC":
            return x.permute(0, 2, 3, 1)
        x = x.flatten(2).transpose(1, 2)
        if self.prefix is None:
            return x
        tokens = self.prefix(summary).reshape(x.shape[0], self.target_prefix, x.shape[2])
        return torch.cat([tokens, x], 1)
