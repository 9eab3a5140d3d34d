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

    `source` and `target` are (layout, channels, prefix tokens, grid); the grid is (height, width), (length,) for tokens
    of an unknown grid, or () for pooled features. Unless both grids are known, positions count as one row, row by row.
    An axis that shrinks is averaged by area before the linear map, so that all positions weigh the same; one that grows
    is interpolated after it, and pooled features are repeated at every position. Prefix (class, register) tokens of the
    target are a linear map of the source's mean and prefix tokens; those of the source go nowhere else.
    """

    rows: torch.Tensor | None
    columns: torch.Tensor | None

    def __init__(
        self, source: tuple[str, int, int, tuple[int, ...]], target: tuple[str, int, int, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.source_layout, channels, self.source_prefix, before = source
        self.target_layout, width, self.target_prefix, self.target_grid = target
        self.linear = nn.Linear(channels, width)
        tokens = 1 + self.source_prefix
        self.prefix = nn.Linear(tokens * channels, self.target_prefix * width) if self.target_prefix else None
        known = len(before) == len(self.target_grid) == 2
        old, new = (grid if known else (1, torch.Size(grid).numel()) for grid in (before, self.target_grid))
        self.before, self.after = (old[0], old[1]), (new[0], new[1])
        self.kernel = [a // b if a % b == 0 else 1 for a, b in zip(self.before, self.after, strict=True)]
        rows, columns = (self.area(a, b) for a, b in zip(self.before, self.after, strict=True))
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", None if columns is None else columns.T.contiguous(), persistent=False)

    @staticmethod
    def area(before: int, after: int) -> torch.Tensor | None:
        """(after, before) shares of each new interval that the old ones fill; None where an even average does."""
        if before <= after or before % after == 0:
            return None
        start, old = torch.arange(after)[:, None] * before, torch.arange(before) * after
        overlap = torch.minimum(start + before, old + after) - torch.maximum(start, old)
        return overlap.clamp_min(0) / before

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The source as a map (N, C, H, W) and a summary (N, (1 + prefix) * C): its mean, then its prefix tokens."""
        if self.source_layout == "NC":
            return x[:, :, None, None], x
        if self.source_layout == "NLC":
            tokens = x[:, self.source_prefix :]
            summary = torch.cat([tokens.mean(1, keepdim=True), x[:, : self.source_prefix]], 1).flatten(1)
            return tokens.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.before), summary
        if self.source_layout == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return x.reshape(x.shape[0], x.shape[1], *self.before), x.mean((2, 3))

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        """Average (N, C, H, W) over every axis that the target has less of."""
        if self.kernel != [1, 1]:
            x = F.avg_pool2d(x, self.kernel)
        if self.rows is not None:
            x = self.rows @ x
        return x if self.columns is None else x @ self.columns

    def map(self, x: torch.Tensor) -> torch.Tensor:
        """The linear map of the channels of (N, C, H, W)."""
        return F.conv2d(x, self.linear.weight[:, :, None, None], self.linear.bias)

    def enlarge(self, x: torch.Tensor) -> torch.Tensor:
        """Interpolate (N, C, H, W) over every axis that the target has more of."""
        if (x.shape[2], x.shape[3]) == self.after:
            return x
        return F.interpolate(x, size=self.after, mode="bilinear", align_corners=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, summary = self.split(x)
        if self.target_layout == "NC":
            pooled: torch.Tensor = self.linear(x.mean((2, 3)))
            return pooled
        x = self.enlarge(self.map(self.shrink(x)))
        if self.target_layout == "NCHW":
            return x.reshape(x.shape[0], x.shape[1], *self.target_grid)
        if self.target_layout == "NHWC":
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], *self.target_grid, x.shape[1])
        x = x.flatten(2).transpose(1, 2)
        if self.prefix is None:
            return x
        tokens = self.prefix(summary).reshape(x.shape[0], self.target_prefix, x.shape[2])
        return torch.cat([tokens, x], 1)


class DeryStitch(nn.Module):
    """The paper's stitch between maps: batch norm, a convolution whose kernel is its stride, without bias, leaky ReLU.

    `source` is (layout, channels, (height, width)), `target` (layout, channels); tokens count row by row.
    """

    def __init__(self, source: tuple[str, int, tuple[int, int]], target: tuple[str, int], stride: int = 1) -> None:
        super().__init__()
        self.source_layout, channels, self.grid = source
        self.target_layout, width = target
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, width, stride, stride, bias=False)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.source_layout == "NLC":
            x = x.unflatten(1, self.grid)
        if self.source_layout != "NCHW":
            x = x.permute(0, 3, 1, 2)
        x = self.act(self.conv(self.norm(x)))
        if self.target_layout != "NCHW":
            x = x.permute(0, 2, 3, 1)
        return x.flatten(1, 2) if self.target_layout == "NLC" else x


class DeryTokenStitch(nn.Module):
    """The paper's stitch between tokens: layer norm, a linear map without bias, leaky ReLU.

    It works on the last axis; `grid` is the (height, width) that the positions get, None where they stay in a row.
    """

    def __init__(self, channels: int, width: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, width, bias=False)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.linear(self.norm(x)))
        x = x.flatten(1, -2)
        return x if self.grid is None else x.unflatten(1, self.grid)


class Stem(nn.Module):
    """A fresh stem: normalisation, 7×7 convolution of stride 2, batch norm, ReLU, 3×3 max pooling of stride 2."""

    def __init__(self, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv = nn.Conv2d(len(mean), channels, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.pool(self.act(self.norm(self.conv(self.normalize(x)))))
        return pooled


class Head(nn.Module):
    """A fresh head: the mean over all positions, then a linear layer; `prefix` leading tokens are left out."""

    def __init__(self, layout: str, channels: int, prefix: int, classes: int) -> None:
        super().__init__()
        self.layout, self.prefix = layout, prefix
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.layout:
            case "NCHW":
                x = x.mean((2, 3))
            case "NHWC":
                x = x.mean((1, 2))
            case "NLC":
                x = x[:, self.prefix :].mean(1)
        logits: torch.Tensor = self.linear(x)
        return logits
