"""Spatio-temporal and spatial transformers over frames of tokens (Sec. 3.2; Xu et al., 2020; UniVLA's blocks).

Text tokens join a frame after its input stem and carry no position; padding is masked as keys, batch-major, so a
sample gives the same output alone and beside longer sentences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.attention import Attention, Mlp, sincos_pos_embed_1d

# B batch, T frames, S tokens of a frame, L text tokens, D width


class SpatialBlock(nn.Module):
    """Pre-norm attention among the tokens of one frame, then an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_spatial, self.spatial = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, S, D), mask (B, S) -> (B, S, D)."""
        x = x + self.spatial(self.norm_spatial(x), key_mask=key_mask)
        return x + self.mlp(self.norm_mlp(x))


class SpatioTemporalBlock(nn.Module):
    """Pre-norm attention inside each frame, causal attention over the frames at each token position, then an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_spatial, self.spatial = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_temporal, self.temporal = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, T, S, D), mask (B T, S) -> (B, T, S, D)."""
        frames, tokens = x.shape[1:3]
        inside = self.spatial(self.norm_spatial(x).flatten(0, 1), key_mask=key_mask)
        x = x + inside.unflatten(0, (-1, frames))
        across = self.temporal(self.norm_temporal(x).transpose(1, 2).flatten(0, 1), causal=True)  # (B S, T, D)
        x = x + across.unflatten(0, (-1, tokens)).transpose(1, 2)
        return x + self.mlp(self.norm_mlp(x))


class SpatioTemporalTransformer(nn.Module):
    """`layers` spatio-temporal blocks over `tokens` input tokens a frame; the encoder of the inverse model."""

    def __init__(self, in_dim: int, dim: int, *, tokens: int, layers: int, heads: int) -> None:
        super().__init__()
        self.stem = _stem(in_dim, dim)
        self.register_buffer("positions", _raster(tokens, dim), persistent=False)
        self.blocks = nn.ModuleList(SpatioTemporalBlock(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """(B, T, S, in_dim), text (B, L, D) with mask (B, L) joins every frame -> (B, T, S, D)."""
        batch, frames, tokens = x.shape[:3]
        x, mask = self.stem(x) + self.pos_embed[:tokens], None
        if text is not None:
            x = torch.cat([x, text[:, None].expand(-1, frames, -1, -1).to(x.dtype)], dim=2)
            mask = _key_mask(text_mask, tokens).repeat_interleave(frames, dim=0)  # batch-major, as flatten(0, 1)
        for block in self.blocks:
            x = block(x, mask)
        return x[:, :, :tokens]


class SpatialTransformer(nn.Module):
    """`layers` spatial blocks over `tokens` input tokens; the decoder of the inverse model."""

    def __init__(self, in_dim: int, dim: int, *, out_dim: int, tokens: int, layers: int, heads: int) -> None:
        super().__init__()
        self.stem = _stem(in_dim, dim)
        self.register_buffer("positions", _raster(tokens, dim), persistent=False)
        self.blocks = nn.ModuleList(SpatialBlock(dim, heads) for _ in range(layers))
        self.out = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """(B, S, in_dim), text (B, L, D) with mask (B, L) -> (B, S, out_dim)."""
        tokens = x.shape[1]
        x, mask = self.stem(x) + self.pos_embed[:tokens], None
        if text is not None:
            x, mask = torch.cat([x, text.to(x.dtype)], dim=1), _key_mask(text_mask, tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(x[:, :tokens])


def attention_weights(attention: Attention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The softmax that SDPA never shows: x (B, S, D) -> (B, heads, S, S). For pictures, not for training."""
    q, k = (
        project(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for project in (attention.to_q, attention.to_k)
    )
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    return logits.softmax(-1)


def _stem(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim), nn.LayerNorm(dim))


def _raster(tokens: int, dim: int) -> Tensor:
    """(tokens, dim) codes of the token index, sines and cosines interleaved as in UniVLA's weights."""
    return torch.stack(sincos_pos_embed_1d(tokens, dim).chunk(2, dim=1), dim=-1).flatten(1)


def _key_mask(text_mask: Tensor, tokens: int) -> Tensor:
    return torch.cat([text_mask.new_ones(len(text_mask), tokens), text_mask], dim=1)
