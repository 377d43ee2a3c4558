"""Action adapter: a diffusion transformer that turns latent actions into robot commands (Sec. 3.3, A.3, Table 10).

B batch, k noise draws of a sample, A actions, S context tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention import Attention, Mlp, modulate, sincos_pos_embed_1d


class Context(NamedTuple):
    """What the actions are denoised under."""

    tokens: Tensor  # (B, S, D)
    goal: Tensor  # (B, D), joins the noise level in adaLN


class SigmaEmbedder(nn.Module):
    """Noise level -> ln(sigma) / 4 -> sinusoids -> MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, sigma: Tensor) -> Tensor:
        """(N,) -> (N, D)."""
        half = self.dim // 2
        omega = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=sigma.device))
        angle = (sigma.log() / 4)[:, None] * omega
        return self.fc2(F.mish(self.fc1(torch.cat([angle.sin(), angle.cos()], dim=1))))


class DiTBlock(nn.Module):
    """Self-attention over the actions, cross-attention to the whole context, MLP; the first and last under
    adaLN-zero."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention = Attention(dim, heads, qkv_bias=True)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, heads, qkv_bias=True)
        self.norm_mlp = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Linear(dim, 6 * dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        """x (B*k, A, D), context (B, S, D), condition (B*k, D) -> (B*k, A, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(F.silu(condition)).chunk(6, dim=1)
        attended = self.self_attention(modulate(self.norm_self(x), shift1, scale1))
        x = x + gate1[:, None] * self.dropout(attended)
        # the draws of a sample share its context: they queue on the query axis, and keys and values are made once
        queries = self.norm_cross(x).reshape(len(context), -1, x.shape[-1])
        x = x + self.dropout(self.cross_attention(queries, context).view_as(x))
        return x + gate2[:, None] * self.dropout(self.mlp(modulate(self.norm_mlp(x), shift2, scale2)))


class ActionAdapter(nn.Module):
    """12 layers of width 384 at full scale (Table 10), conditioned by named streams of tokens.

    streams: name -> (number of tokens, width); goal_dim: width of the sentence feature. Every action query attends to
    every context token, and positions are coded: the released code's causal cross-attention hides most of the context.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[int, int]],
        goal_dim: int,
        *,
        dim: int = 384,
        layers: int = 12,
        heads: int = 8,
        horizon: int = 10,
        action_dim: int = 7,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.horizon, self.action_dim = horizon, action_dim
        self.goal = nn.Sequential(nn.Linear(goal_dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.streams = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim)) for name, (_, width) in streams.items()}
        )
        self.stream_pos_embed = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(count, dim) * 0.02) for name, (count, _) in streams.items()}
        )
        self.action_embedder = nn.Linear(action_dim, dim)
        self.action_pos_embed = nn.Parameter(sincos_pos_embed_1d(horizon, dim))
        self.sigma_embedder = SigmaEmbedder(dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.adaLN_modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, action_dim)
        for layer in [self.adaLN_modulation, self.out] + [block.adaLN_modulation for block in self.blocks]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in self.blocks:  # no gate stands before cross-attention; its output starts at zero instead
            nn.init.zeros_(block.cross_attention.to_out.weight)
            nn.init.zeros_(block.cross_attention.to_out.bias)

    def encode(self, goal: Tensor, streams: Mapping[str, Tensor]) -> Context:
        """Sentence feature (B, goal_dim) and name -> (B, tokens, width) -> context of all tokens, the goal first."""
        if streams.keys() != self.streams.keys():
            raise ValueError(f"the adapter reads streams {sorted(self.streams)}, got {sorted(streams)}")
        goal = self.goal(goal)
        tokens = [self.streams[name](streams[name]) + self.stream_pos_embed[name] for name in self.streams]
        return Context(torch.cat([goal[:, None], *tokens], dim=1), goal)

    def forward(self, noisy: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Scaled noisy actions (B*k, A, 7), the k draws of a sample in a row, and sigma (B*k,) -> network output (B*k,
        A, 7)."""
        draws = len(noisy) // len(context.tokens)
        condition = self.sigma_embedder(sigma) + context.goal.repeat_interleave(draws, dim=0)
        x = self.action_embedder(noisy) + self.action_pos_embed
        for block in self.blocks:
            x = block(x, context.tokens, condition)
        shift, scale = self.adaLN_modulation(F.silu(condition)).chunk(2, dim=1)
        return self.out(modulate(self.norm(x), shift, scale))
