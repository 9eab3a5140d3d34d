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
    """Joins two blocks: regrids, maps the channels and changes the layout.

    `source` and `target` are (layout, channels, prefix tokens, grid); the grid is (height, width), (length,) for tokens
    of an unknown grid, or () for pooled features. Unless both grids are known, positions count as one row, row by row.
    `form` is (regrid, map, rank). An axis that shrinks does so before the map: "mean" by area, so that all positions
    weigh the same, "strided" to the first position of each cell, "bilinear" to the nearest ones. One that grows is
    interpolated after the map, and pooled features are repeated at every position. The map is "full" (linear, through
    `rank` directions where that is not 0), "affine" (a scale and a shift for each channel) or "identity". Prefix
    (class, register) tokens of the target are a linear map of the source's mean and prefix tokens, or where the map is
    not full each the source's own; those of the source go nowhere else.
    """

    rows: torch.Tensor | None
    columns: torch.Tensor | None

    def __init__(
        self,
        source: tuple[str, int, int, tuple[int, ...]],
        target: tuple[str, int, int, tuple[int, ...]],
        form: tuple[str, str, int] = ("mean", "full", 0),
    ) -> None:
        super().__init__()
        self.source_layout, channels, self.source_prefix, before = source
        self.target_layout, width, self.target_prefix, self.target_grid = target
        self.regrid, self.kind, rank = form
        full, tokens = self.kind == "full", 1 + self.source_prefix
        self.inner = nn.Linear(channels, rank, bias=False) if rank else None
        self.linear = nn.Linear(rank or channels, width) if full else None
        self.prefix = nn.Linear(tokens * channels, self.target_prefix * width) if full and self.target_prefix else None
        rows = 1 + self.target_prefix
        self.scale = nn.Parameter(torch.ones(rows, width)) if self.kind == "affine" else None
        self.shift = nn.Parameter(torch.zeros(rows, width)) if self.kind == "affine" else None
        known = len(before) == len(self.target_grid) == 2
        old, new = (grid if known else (1, torch.Size(grid).numel()) for grid in (before, self.target_grid))
        self.before, self.after = (old[0], old[1]), (new[0], new[1])
        self.kernel = [a // b if a % b == 0 else 1 for a, b in zip(self.before, self.after, strict=True)]
        areas = [self.area(a, b) if self.regrid == "mean" else None for a, b in zip(old, new, strict=True)]
        self.register_buffer("rows", areas[0], persistent=False)
        self.register_buffer("columns", None if areas[1] is None else areas[1].T.contiguous(), persistent=False)
        self.kept = source == target and not full

    def extra_repr(self) -> str:
        return f"{self.source_layout} {self.before} > {self.target_layout} {self.after}, {self.regrid}, {self.kind}"

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
        """Regrid (N, C, H, W) over every axis that the target has less of."""
        if self.regrid == "strided":
            return x[:, :, :: self.kernel[0], :: self.kernel[1]]
        if self.regrid == "bilinear":
            size = [min(pair) for pair in zip(self.before, self.after, strict=True)]
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        if self.kernel != [1, 1]:
            x = F.avg_pool2d(x, self.kernel)
        if self.rows is not None:
            x = self.rows @ x
        return x if self.columns is None else x @ self.columns

    def map(self, x: torch.Tensor) -> torch.Tensor:
        """The map of the channels of (N, C, H, W), regridded; a stride is the map's own, since that is faster."""
        strided = self.regrid == "strided" and self.kind != "identity"
        step = self.kernel if strided else [1, 1]
        x = x if strided else self.shrink(x)
        if self.scale is not None and self.shift is not None:
            scale, shift = self.scale[-1], self.shift[-1]
            if strided:
                return F.conv2d(x, scale[:, None, None, None], shift, step, groups=len(scale))
            return x * scale[:, None, None] + shift[:, None, None]
        if self.linear is None:
            return x
        if self.inner is not None:
            x, step = F.conv2d(x, self.inner.weight[:, :, None, None], None, step), [1, 1]
        return F.conv2d(x, self.linear.weight[:, :, None, None], self.linear.bias, step)

    def enlarge(self, x: torch.Tensor) -> torch.Tensor:
        """Interpolate (N, C, H, W) over every axis that the target has more of."""
        if (x.shape[2], x.shape[3]) == self.after:
            return x
        return F.interpolate(x, size=self.after, mode="bilinear", align_corners=False)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """The map of (N, C)."""
        if self.scale is not None and self.shift is not None:
            return x * self.scale[0] + self.shift[0]
        if self.linear is None:
            return x
        mapped: torch.Tensor = self.linear(x if self.inner is None else self.inner(x))
        return mapped

    def in_place(self, x: torch.Tensor) -> torch.Tensor:
        """What a map of each channel for itself makes of a value that keeps its type."""
        if self.scale is None or self.shift is None:
            return x
        if self.source_layout == "NCHW":
            return x * self.scale[0][:, None, None] + self.shift[0][:, None, None]
        if not self.target_prefix:
            return x * self.scale[0] + self.shift[0]
        places = x.shape[1] - self.target_prefix
        scale, shift = (torch.cat([w[:-1], w[-1:].expand(places, -1)]) for w in (self.scale, self.shift))
        return x * scale + shift

    def first(self, x: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """The target's prefix tokens (N, prefix, C) from the source and its summary."""
        if self.prefix is not None:
            mapped: torch.Tensor = self.prefix(summary).reshape(summary.shape[0], self.target_prefix, -1)
            return mapped
        own = x[:, : self.target_prefix]
        return own if self.scale is None or self.shift is None else own * self.scale[:-1] + self.shift[:-1]

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        if self.kept:
            return self.in_place(source)
        x, summary = self.split(source)
        if self.target_layout == "NC":
            return self.pooled(x.mean((2, 3)))
        x = self.enlarge(self.map(x))
        if self.target_layout == "NCHW":
            return x.reshape(x.shape[0], x.shape[1], *self.target_grid)
        if self.target_layout == "NHWC":
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], *self.target_grid, x.shape[1])
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([self.first(source, summary), x], 1) if self.target_prefix else x


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
