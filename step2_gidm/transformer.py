"""Transformers over frames of tokens: spatio-temporal (encoder) and spatial (decoder) (Sec. 3.2; Xu et al., 2020).

The blocks have UniVLA's layout, so that its published weights fit. Text tokens are appended to the tokens of a frame
after the input projection and get no position embedding. The padding of a sentence is masked out as keys, so a sample
gives the same output alone and in a batch with longer sentences.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from common.attention import Attention, Mlp, sincos_pos_embed_1d

# B batch, T frames, S tokens of a frame, L text tokens, D width


class SpatialBlock(nn.Module):
    """Pre-norm attention among the tokens of one frame, then an MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_spatial, self.spatial = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Tokens x (B, S, D), key_mask (B, S) with True where a token may be attended to -> (B, S, D)."""
        x = x + self.spatial(self.norm_spatial(x), key_mask=key_mask)  # (B, S, D)
        return x + self.mlp(self.norm_mlp(x))  # (B, S, D)


class SpatioTemporalBlock(nn.Module):
    """Pre-norm attention inside each frame, causal attention over the frames at each token position, then an MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_spatial, self.spatial = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm_temporal, self.temporal = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Tokens x (B, T, S, D), key_mask (B T, S) with True where a token may be attended to -> (B, T, S, D)."""
        batch, frames = x.shape[:2]
        within = rearrange(self.norm_spatial(x), "b t s d -> (b t) s d")
        within = self.spatial(within, key_mask=key_mask)  # (B T, S, D)
        x = x + rearrange(within, "(b t) s d -> b t s d", t=frames)
        across = rearrange(self.norm_temporal(x), "b t s d -> (b s) t d")
        across = self.temporal(across, causal=True)  # (B S, T, D)
        x = x + rearrange(across, "(b s) t d -> b t s d", b=batch)
        return x + self.mlp(self.norm_mlp(x))  # (B, T, S, D)


class SpatioTemporalTransformer(nn.Module):
    """The encoder of the inverse model: `num_layers` spatio-temporal blocks over frames of `num_tokens` tokens."""

    def __init__(self, in_dim: int, dim: int, *, num_tokens: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.stem = _stem(in_dim, dim)
        self.register_buffer("pos_embed", _interleaved_pos_embed(num_tokens, dim), persistent=False)
        self.blocks = nn.ModuleList(SpatioTemporalBlock(dim, num_heads) for _ in range(num_layers))

    def forward(self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Tokens x (B, T, S, in_dim) -> (B, T, S, D).

        The text (B, L, D) with its mask (B, L), True where there is a token, is appended to every frame.
        """
        frames, tokens = x.shape[1:3]
        x = self.stem(x) + self.pos_embed[:tokens]  # (B, T, S, D)
        key_mask = None
        if text is not None:
            x = torch.cat([x, repeat(text, "b l d -> b t l d", t=frames).to(x.dtype)], dim=2)  # (B, T, S + L, D)
            # In the order of the blocks' (b t). In the public code, masks in a batch belong to other samples.
            key_mask = repeat(_key_mask(text_mask, tokens), "b s -> (b t) s", t=frames)  # (B T, S + L)
        for block in self.blocks:
            x = block(x, key_mask)  # (B, T, S + L, D)
        return x[:, :, :tokens]  # (B, T, S, D)


class SpatialTransformer(nn.Module):
    """The decoder of the inverse model: `num_layers` spatial blocks over `num_tokens` tokens."""

    def __init__(
        self, in_dim: int, dim: int, *, out_dim: int, num_tokens: int, num_layers: int, num_heads: int
    ) -> None:
        super().__init__()
        self.stem = _stem(in_dim, dim)
        self.register_buffer("pos_embed", _interleaved_pos_embed(num_tokens, dim), persistent=False)
        self.blocks = nn.ModuleList(SpatialBlock(dim, num_heads) for _ in range(num_layers))
        self.out = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Tokens x (B, S, in_dim) -> (B, S, out_dim).

        The text (B, L, D) with its mask (B, L), True where there is a token, is appended to x.
        """
        tokens = x.shape[1]
        x = self.stem(x) + self.pos_embed[:tokens]  # (B, S, D)
        key_mask = None
        if text is not None:
            x = torch.cat([x, text.to(x.dtype)], dim=1)  # (B, S + L, D)
            key_mask = _key_mask(text_mask, tokens)  # (B, S + L)
        for block in self.blocks:
            x = block(x, key_mask)  # (B, S + L, D)
        return self.out(x[:, :tokens])  # (B, S, out_dim)


def attention_weights(attention: Attention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The softmax weights of `attention` on x (B, S, D) -> (B, heads, S, S).

    They are computed a second time, because the fused attention does not return them. This is for figures, not for
    training.
    """
    q, k = (
        rearrange(project(x), "b s (h d) -> b h s d", h=attention.heads) for project in (attention.to_q, attention.to_k)
    )
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, S, S)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    return logits.softmax(-1)


def _stem(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim), nn.LayerNorm(dim))


def _interleaved_pos_embed(num_tokens: int, dim: int) -> Tensor:
    """(num_tokens, dim) embedding of the token index, with sines and cosines interleaved as UniVLA's weights expect."""
    return rearrange(sincos_pos_embed_1d(num_tokens, dim), "n (two d) -> n (d two)", two=2)


def _key_mask(text_mask: Tensor, num_tokens: int) -> Tensor:
    """(B, L) -> (B, num_tokens + L): the tokens of the frame may always be attended to."""
    return torch.cat([text_mask.new_ones(len(text_mask), num_tokens), text_mask], dim=1)
