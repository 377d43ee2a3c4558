"""Projector: features of imagined frames, put on one scale, onto the input manifold of the inverse model (Sec. 3.3)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Standardize(nn.Module):
    """Every channel at mean 0 and deviation 1 over the training data, by running statistics that training gathers.

    Channels of a UNet differ in offset and scale by far more than pictures make them differ. Statistics of the batch would
    let samples see each other, and would not exist in use. Every `sparing`-th token is measured: no divisor of a grid, so
    that all places have their turn.
    """

    mean: Tensor
    square: Tensor
    batches: Tensor

    def __init__(self, channels: int, momentum: float = 0.01, sparing: int = 7) -> None:
        super().__init__()
        self.momentum, self.sparing = momentum, sparing
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) -> (..., channels)."""
        rows = x.flatten(0, -2).float()
        if self.training:
            with torch.no_grad():
                seen = rows[::self.sparing]
                self.batches += 1
                share = (1 / self.batches).clamp(min=self.momentum)  # a plain mean at first
                self.mean += share * (seen.mean(0) - self.mean)
                self.square += share * (seen.square().mean(0) - self.square)
        variance = (self.square - self.mean.square()).clamp(min=0)
        return F.batch_norm(rows, self.mean, variance, training=False, eps=1e-6).view_as(x).to(x.dtype)


class Projector(nn.Module):
    """Two-layer MLP; 2560 -> 768 -> 768 at full scale.

    `norm` ends in a LayerNorm, as the DINOv2 tokens that it stands in for do. The released code has none.
    """

    def __init__(self, feature_dim: int, out_dim: int, *, norm: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim) if norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(..., feature_dim) -> (..., out_dim)."""
        return self.norm(self.fc2(F.gelu(self.fc1(features))))


def match_grid(tokens: Tensor, count: int) -> Tensor:
    """Resize square token grids (..., L, D) to (..., count, D) where the two models cut the picture differently."""
    if tokens.shape[-2] == count:
        return tokens
    side, target = round(tokens.shape[-2] ** 0.5), round(count ** 0.5)
    if side * side != tokens.shape[-2] or target * target != count:
        raise ValueError(f"token grids of {tokens.shape[-2]} and {count} tokens are not both square")
    grid = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, (target, target), mode="bilinear", align_corners=False, antialias=True)
    return grid.flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:-2])


def pool_grid(tokens: Tensor, side: int) -> Tensor:
    """Average square token grids (..., N, D) to (..., side * side, D)."""
    rows = round(tokens.shape[-2] ** 0.5)
    grid = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, (rows, rows))
    return F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:-2])
