"""Video former: a 3-D perceiver that reads the imagined frames into a few tokens (Sec. 3.3; Hu et al., 2024).

B batch, V views, F frames, L feature tokens of a frame and view, Q queries of a frame, D width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from common.attention import Attention, Mlp, sincos_pos_embed_1d, sincos_pos_embed_2d


class VideoFormerLayer(nn.Module):
    """Cross-attention to the features within a frame, self-attention of each query over time, and an MLP."""

    def __init__(
        self, dim: int, *, spatial_heads: int, spatial_head_dim: int, temporal_heads: int, temporal_norm: bool
    ) -> None:
        super().__init__()
        self.norm_queries, self.norm_features = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.spatial = Attention(dim, spatial_heads, head_dim=spatial_head_dim, out_bias=False)
        self.norm_temporal = nn.LayerNorm(dim) if temporal_norm else nn.Identity()
        self.temporal = Attention(dim, temporal_heads, qkv_bias=True)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, bias=False)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """queries (B, F, Q, D), features (B*F, V*L, D) -> queries (B, F, Q, D)."""
        batch = len(queries)
        x = rearrange(queries, "b f q d -> (b f) q d")
        normed = self.norm_queries(x)
        # Queries attend to the features of their frame and to each other, as in a perceiver resampler.
        x = x + self.spatial(normed, torch.cat([self.norm_features(features), normed], dim=1))  # (B*F, Q, D)
        x = rearrange(x, "(b f) q d -> (b q) f d", b=batch)
        x = x + self.temporal(self.norm_temporal(x))  # (B*Q, F, D)
        x = rearrange(x, "(b q) f d -> b f q d", b=batch)
        return x + self.mlp(self.norm_mlp(x))


class VideoFormer(nn.Module):
    """16 frames x 14 queries of width 384 in 6 layers at full scale.

    `use_pos_embed` embeds view, row and column of every feature token and the time of every query, and normalizes
    before temporal attention. Without it, the module is VPP's, with its 17,713,536 parameters, in which the content of
    a feature alone tells where it belongs.
    """

    def __init__(
        self,
        feature_dim: int,
        frames: int,
        views: int,
        *,
        tokens: int,
        dim: int = 384,
        embed_hidden_dim: int | None = 768,
        queries: int = 14,
        depth: int = 6,
        spatial_heads: int = 8,
        spatial_head_dim: int = 64,
        temporal_heads: int = 8,
        use_pos_embed: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.num_tokens, self.use_pos_embed = dim, frames * queries, use_pos_embed
        self.feature_embedder = (
            nn.Linear(feature_dim, dim)
            if embed_hidden_dim is None
            else nn.Sequential(nn.Linear(feature_dim, embed_hidden_dim), nn.GELU(), nn.Linear(embed_hidden_dim, dim))
        )
        scale = dim**-0.5 if use_pos_embed else 1.0  # VPP draws both tables from N(0, 1)
        self.frame_embed = nn.Parameter(torch.randn(frames, 1, dim) * scale)
        self.queries = nn.Parameter(torch.randn(frames, queries, dim) * scale)
        if use_pos_embed:
            side = round(tokens**0.5)
            if side * side != tokens:
                raise ValueError(f"positions are embedded on square grids only, and {tokens} tokens form none")
            self.view_embed = nn.Parameter(torch.randn(views, 1, dim) * 0.02)
            self.register_buffer("spatial_pos_embed", sincos_pos_embed_2d(side, side, dim), persistent=False)
            self.register_buffer("temporal_pos_embed", sincos_pos_embed_1d(frames, dim)[:, None], persistent=False)
        self.layers = nn.ModuleList(
            VideoFormerLayer(
                dim,
                spatial_heads=spatial_heads,
                spatial_head_dim=spatial_head_dim,
                temporal_heads=temporal_heads,
                temporal_norm=use_pos_embed,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, V, F, L, feature_dim) -> (B, F*Q, D)."""
        x = self.feature_embedder(features)  # (B, V, F, L, D)
        if self.use_pos_embed:
            x = x + (self.view_embed[:, None] + self.spatial_pos_embed)  # (V, 1, 1, D) + (L, D)
        x = rearrange(x, "b v f l d -> b f (v l) d") + self.frame_embed
        x = rearrange(x, "b f vl d -> (b f) vl d")
        queries = self.queries + self.temporal_pos_embed if self.use_pos_embed else self.queries  # (F, Q, D)
        queries = queries.expand(len(features), -1, -1, -1)  # (B, F, Q, D)
        for layer in self.layers:
            queries = layer(queries, x)  # (B, F, Q, D)
        return rearrange(self.norm(queries), "b f q d -> b (f q) d")
