"""Projector: features of imagined frames, mapped onto the visual tokens that the inverse model reads (Sec. 3.3).

B batch, V views, F imagined frames, P of them that are paired, L feature tokens, N visual tokens, C and E their widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Projector(nn.Module):
    """Two-layer MLP; 2560 -> 768 -> 768 at full scale.

    With `norm` it ends in a LayerNorm, as the DINOv2 tokens do that it imitates. The released code has no LayerNorm.
    """

    uses_present_tokens = True  # the present frame of a pair is the observation itself, seen by DINOv2

    def __init__(self, feature_dim: int, out_dim: int, *, norm: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim) if norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., C) -> visual tokens (..., E)."""
        return self.norm(self.fc2(F.gelu(self.fc1(features))))

    def project_pairs(
        self, features: Tensor, frames: Sequence[int], num_tokens: int, present_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two frames of every pair, on the inverse model's grid of N = `num_tokens` visual tokens.

        features (B, V, F, L, C), frames: numbers of the P imagined frames, present_tokens (B, V, N, E)
        -> present (B, V, 1, N, E), futures (B, V, P, N, E).
        """
        futures = resize_token_grid(self(features[:, :, list(frames)]), num_tokens)  # (B, V, P, N, E)
        return present_tokens[:, :, None], futures


class ImaginedPresentProjector(Projector):
    """The projector of the release: the present of a pair is imagined, too, as frame number `present`.

    A learned embedding tells the two frames of a pair apart. DINOv2 is not used, so the inverse model reads features
    that it was not pretrained on (official release, Step 3).
    """

    uses_present_tokens = False

    def __init__(self, feature_dim: int, out_dim: int, *, present: int = 0, norm: bool = False) -> None:
        super().__init__(feature_dim, out_dim, norm=norm)
        self.present = present
        self.time_pos_embed = nn.Parameter(torch.randn(2, 1, out_dim))

    def project_pairs(
        self, features: Tensor, frames: Sequence[int], num_tokens: int, present_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As Projector.project_pairs; `present_tokens` are ignored."""
        projected = resize_token_grid(self(features[:, :, [self.present, *frames]]), num_tokens)  # (B, V, 1 + P, N, E)
        return projected[:, :, :1] + self.time_pos_embed[0], projected[:, :, 1:] + self.time_pos_embed[1]


def resize_token_grid(tokens: Tensor, num_tokens: int) -> Tensor:
    """Resize square token grids, (..., L, E) -> (..., num_tokens, E); the two models divide a picture differently."""
    if tokens.shape[-2] == num_tokens:
        return tokens
    side, target = round(tokens.shape[-2] ** 0.5), round(num_tokens**0.5)
    if side * side != tokens.shape[-2] or target * target != num_tokens:
        raise ValueError(f"token grids of {tokens.shape[-2]} and {num_tokens} tokens are not both square")
    grid = rearrange(tokens, "... (h w) e -> (...) e h w", h=side)
    grid = F.interpolate(grid, (target, target), mode="bilinear", align_corners=False, antialias=True)
    return rearrange(grid, "n e h w -> n (h w) e").unflatten(0, tokens.shape[:-2])


def pool_token_grid(tokens: Tensor, side: int) -> Tensor:
    """Average square token grids, (..., N, E) -> (..., side * side, E)."""
    grid = rearrange(tokens, "... (h w) e -> (...) e h w", h=round(tokens.shape[-2] ** 0.5))
    grid = F.adaptive_avg_pool2d(grid, side)
    return rearrange(grid, "n e h w -> n (h w) e").unflatten(0, tokens.shape[:-2])
