"""Projector: features of imagined frames, put on one scale, onto the input manifold of the inverse model (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """Two-layer MLP; 2560 -> 768 -> 768 at full scale.

    `norm` ends in a LayerNorm, as the DINOv2 tokens that it stands in for do. The released code has none.
    """

    uses_present_tokens = True  # the present of a pair is DINOv2's view of the observation

    def __init__(self, feature_dim: int, out_dim: int, *, norm: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim) if norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(..., feature_dim) -> (..., out_dim)."""
        return self.norm(self.fc2(F.gelu(self.fc1(features))))

    def project_pairs(
        self, features: Tensor, frames: Sequence[int], tokens: int, now: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two moments for the inverse model, on its grid of N = `tokens`: the present and every one of the P imagined
        `frames`.

        features (B, V, F, L, feature_dim), now (B, V, N, out_dim) -> present (B, V, 1, N, out_dim), futures (B, V, P,
        N, out_dim).
        """
        return now[:, :, None], resize_token_grid(self(features[:, :, list(frames)]), tokens)


class ImaginedPresentProjector(Projector):
    """The release's: the present, too, is an imagined frame, number `present`, and learned codes tell the two moments
    apart.

    DINOv2 is never asked, so the inverse model works on features that it was not pretrained on (official release, Step
    3).
    """

    uses_present_tokens = False

    def __init__(self, feature_dim: int, out_dim: int, *, present: int = 0, norm: bool = False) -> None:
        super().__init__(feature_dim, out_dim, norm=norm)
        self.present = present
        self.time_pos_embed = nn.Parameter(torch.randn(2, 1, out_dim))

    def project_pairs(
        self, features: Tensor, frames: Sequence[int], tokens: int, now: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As Projector.pair; `now` is not read."""
        seen = resize_token_grid(self(features[:, :, [self.present, *frames]]), tokens)
        return seen[:, :, :1] + self.time_pos_embed[0], seen[:, :, 1:] + self.time_pos_embed[1]


def resize_token_grid(tokens: Tensor, count: int) -> Tensor:
    """Resize square token grids (..., L, D) to (..., count, D) where the two models cut the picture differently."""
    if tokens.shape[-2] == count:
        return tokens
    side, target = round(tokens.shape[-2] ** 0.5), round(count**0.5)
    if side * side != tokens.shape[-2] or target * target != count:
        raise ValueError(f"token grids of {tokens.shape[-2]} and {count} tokens are not both square")
    grid = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, (target, target), mode="bilinear", align_corners=False, antialias=True)
    return grid.flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:-2])


def pool_token_grid(tokens: Tensor, side: int) -> Tensor:
    """Average square token grids (..., N, D) to (..., side * side, D)."""
    rows = round(tokens.shape[-2] ** 0.5)
    grid = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, (rows, rows))
    return F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:-2])
