"""Another forward model: DINOv2's tokens of the next frames, all at once (Table 6, row "DINO").

The paper names it and no more. Ours is a regression in the space that the inverse model reads: no noise, no picture. B
batch,
F frames, N visual tokens of a frame, E their width, T text tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.attention import Attention, Mlp, sincos_pos_embed_1d, sincos_pos_embed_2d
from common.contracts import FrameBatch
from common.frozen import CLIPTextEncoder, DinoV2


class FutureBlock(nn.Module):
    """Pre-norm attention inside each frame, over the frames at each place, to the sentence, then an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_spatial, self.spatial = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_temporal, self.temporal = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_text, self.cross_attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, F, N, D), text (B, T, D) -> (B, F, N, D)."""
        frames, tokens = x.shape[1:3]
        x = x + self.spatial(self.norm_spatial(x).flatten(0, 1)).unflatten(0, (-1, frames))
        across = self.temporal(self.norm_temporal(x).transpose(1, 2).flatten(0, 1))
        x = x + across.unflatten(0, (-1, tokens)).transpose(1, 2)
        x = x + self.cross_attn(self.norm_text(x).flatten(1, 2), text).unflatten(1, (frames, tokens))
        return x + self.mlp(self.norm_mlp(x))


class DinoFuture(nn.Module):
    """contracts.FutureDynamics in DINOv2's space: the present's tokens and a sentence -> tokens of F frames, the first
    being now.

    It predicts the change from now and starts from no change. Frozen eyes and text stay out of its weights.
    """

    def __init__(
        self,
        vision: DinoV2,
        text: CLIPTextEncoder,
        *,
        num_frames: int = 16,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        self.vision, self.text, self.num_frames = vision, text, num_frames
        self.feature_dim, self.num_tokens = vision.dim, vision.num_tokens
        self.stem, self.text_proj = nn.Linear(vision.dim, dim), nn.Linear(text.dim, dim)
        self.register_buffer("places", sincos_pos_embed_2d(*vision.grid, dim), persistent=False)
        self.register_buffer("times", sincos_pos_embed_1d(num_frames, dim)[:, None], persistent=False)
        self.blocks = nn.ModuleList(FutureBlock(dim, heads) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, vision.dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, batch: FrameBatch) -> dict[str, Tensor]:
        """Frames (B, F, 3, H, W) in [0, 1] and B sentences -> the training loss, beside the error of copying the
        present."""
        frames = batch["frames"]
        if frames.shape[1] != self.num_frames:
            raise ValueError(f"clips of {frames.shape[1]} frames for a model of {self.num_frames}: {batch['id'][:3]}")
        truth = self.vision(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        loss = (self.predict(truth[:, 0], batch["text"])[:, 1:].float() - truth[:, 1:]).square().mean()
        return {"loss": loss, "mse": loss.detach(), "copy_mse": (truth[:, :1] - truth[:, 1:]).square().mean()}

    def predict(self, now: Tensor, text: list[str]) -> Tensor:
        """Visual tokens (B, N, E) of now, B strings -> (B, F, N, E)."""
        x = (self.stem(now) + self.spatial_pos_embed)[:, None] + self.temporal_pos_embed
        text_tokens = self.text_proj(self.text(text).to(x.device))
        for block in self.blocks:
            x = block(x, text_tokens)
        return now[:, None] + self.out(self.norm(x))

    def imagine(self, image: Tensor, text: list[str], *, seed: int = 0) -> Tensor:
        """(B, 3, H, W) in [-1, 1], B strings -> (B, F, N, E). Nothing is drawn, so `seed` changes nothing."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return self.predict(self.vision((image + 1) / 2), text)

    def freeze_unused_blocks(self) -> None:
        """Every part takes part in `imagine`."""
