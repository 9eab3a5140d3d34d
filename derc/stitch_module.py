"""The stitch as a torch module; the text below the imports is written into every bundle's model.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Stitch(nn.Module):
    """Joins two blocks: to a channels-last map, regrid, linear map, to the target's layout.

    `source` and `target` are (layout, channels, prefix tokens, (height, width) or None). Pooling comes before the linear
    map and enlarging after it. Prefix (class, register) tokens of the target are a linear map of the source's mean and
    prefix tokens.
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
        self.prefix = nn.Linear((1 + self.source_prefix) * channels, self.target_prefix * width) if self.target_prefix else None

    def regrid(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Resize (N, H, W, C) to `grid`: average pooling to smaller, bilinear to larger grids."""
        x = x.permute(0, 3, 1, 2)
        height, width = x.shape[2], x.shape[3]
        if grid[0] <= height and grid[1] <= width:
            if height % grid[0] == 0 and width % grid[1] == 0:
                x = F.avg_pool2d(x, (height // grid[0], width // grid[1]))
            else:
                x = F.interpolate(x, size=grid, mode="bilinear", antialias=False, align_corners=False)
        else:
            x = F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
        return x.permute(0, 2, 3, 1)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Source value as a map (N, H, W, C) and its summary (N, (1 + prefix) * C): mean, then prefix tokens."""
        if self.source_layout == "NC":
            return x[:, None, None, :], x
        if self.source_layout == "NCHW":
            x = x.permute(0, 2, 3, 1)
        elif self.source_layout == "NLC":
            tokens = x[:, self.source_prefix :]
            summary = torch.cat([tokens.mean(1, keepdim=True), x[:, : self.source_prefix]], 1).flatten(1)
            if self.source_grid is not None:
                return tokens.unflatten(1, self.source_grid), summary
            return tokens.unsqueeze(1), summary
        return x, x.mean((1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, summary = self.split(x)
        if self.target_layout == "NC":
            return self.linear(x.mean((1, 2)))
        grid = self.target_grid
        if grid is None or grid == (x.shape[1], x.shape[2]):
            x = self.linear(x)
        elif grid[0] * grid[1] <= x.shape[1] * x.shape[2]:
            x = self.linear(self.regrid(x, grid))
        else:
            x = self.regrid(self.linear(x), grid)
        if self.target_layout == "NCHW":
            return x.permute(0, 3, 1, 2).contiguous()
        if self.target_layout == "NHWC":
            return x
        x = x.flatten(1, 2)
        if self.prefix is None:
            return x
        return torch.cat([self.prefix(summary).unflatten(1, (self.target_prefix, -1)), x], 1)
