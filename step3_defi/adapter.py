"""Action adapter: a diffusion transformer that turns latent actions into robot commands (Sec. 3.3, A.3, Table 10).

B batch, k noise draws of a sample, A actions, S context tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.attention import Attention, Mlp, modulate, sincos_pos_embed_1d


class Context(NamedTuple):
    """The condition under which actions are denoised."""

    tokens: Tensor  # (B, S, D)
    goal: Tensor  # (B, D), added to the embedding of the noise level in adaLN


class SigmaEmbedder(nn.Module):
    """Embeds a noise level: sinusoids of ln(sigma) / 4, then an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, sigma: Tensor) -> Tensor:
        """(N,) -> (N, D)."""
        half = self.dim // 2
        omega = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=sigma.device))  # (D/2,)
        angle = (sigma.log() / 4)[:, None] * omega  # (N, D/2)
        return self.fc2(F.mish(self.fc1(torch.cat([angle.sin(), angle.cos()], dim=1))))


class DiTBlock(nn.Module):
    """Self-attention over the actions, cross-attention to the context, MLP; the first and the last with adaLN-Zero."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention = Attention(dim, num_heads, qkv_bias=True)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads, qkv_bias=True)
        self.norm_mlp = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Linear(dim, 6 * dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        """x (B*k, A, D), context (B, S, D), condition (B*k, D) -> (B*k, A, D)."""
        shift_self, scale_self, gate_self, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            F.silu(condition)
        ).chunk(6, dim=1)  # 6 x (B*k, D)
        attended = self.self_attention(modulate(self.norm_self(x), shift_self, scale_self))  # (B*k, A, D)
        x = x + gate_self[:, None] * self.dropout(attended)
        # The draws of a sample share its context. As one long sequence of queries they share its keys and values, too.
        queries = rearrange(self.norm_cross(x), "(b k) a d -> b (k a) d", b=len(context))
        attended = rearrange(self.cross_attention(queries, context), "b (k a) d -> (b k) a d", a=x.shape[1])
        x = x + self.dropout(attended)
        return x + gate_mlp[:, None] * self.dropout(self.mlp(modulate(self.norm_mlp(x), shift_mlp, scale_mlp)))


class ActionAdapter(nn.Module):
    """Diffusion transformer over the actions of a chunk; 12 layers of width 384 at full scale (Table 10).

    streams: name -> (number of tokens, width); goal_dim: width of the sentence's feature. Every action attends to every
    token of the context, and positions are embedded. In the released code a causal mask on the cross-attention hides
    most of the context (see released.vpp_adapter).
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[int, int]],
        goal_dim: int,
        *,
        dim: int = 384,
        layers: int = 12,
        num_heads: int = 8,
        action_horizon: int = 10,
        action_dim: int = 7,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.action_horizon, self.action_dim = action_horizon, action_dim
        self.goal_embedder = nn.Sequential(nn.Linear(goal_dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.stream_embedders = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim)) for name, (_, width) in streams.items()}
        )
        self.stream_pos_embed = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(count, dim) * 0.02) for name, (count, _) in streams.items()}
        )
        self.action_embedder = nn.Linear(action_dim, dim)
        self.action_pos_embed = nn.Parameter(sincos_pos_embed_1d(action_horizon, dim))
        self.sigma_embedder = SigmaEmbedder(dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, num_heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.adaLN_modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, action_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Zero the modulation layers and the output layer, as DiT does, and the outputs of cross-attention.

        Cross-attention has no gate that could start at zero.
        """
        zeroed = [self.adaLN_modulation, self.out, *(block.adaLN_modulation for block in self.blocks)]
        for layer in [*zeroed, *(block.cross_attention.to_out for block in self.blocks)]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, goal: Tensor, streams: Mapping[str, Tensor]) -> Context:
        """Sentence's feature (B, goal_dim), name -> tokens (B, n, width) -> the context, which starts with the goal."""
        if streams.keys() != self.stream_embedders.keys():
            raise ValueError(f"the adapter reads streams {sorted(self.stream_embedders)}, got {sorted(streams)}")
        goal = self.goal_embedder(goal)  # (B, D)
        tokens = [embed(streams[name]) + self.stream_pos_embed[name] for name, embed in self.stream_embedders.items()]
        return Context(torch.cat([goal[:, None], *tokens], dim=1), goal)

    def forward(self, noisy: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Scaled noisy actions (B*k, A, 7), the k draws of a sample in a row, sigma (B*k,) -> output (B*k, A, 7)."""
        draws = len(noisy) // len(context.tokens)
        condition = self.sigma_embedder(sigma) + context.goal.repeat_interleave(draws, dim=0)  # (B*k, D)
        x = self.action_embedder(noisy) + self.action_pos_embed  # (B*k, A, D)
        for block in self.blocks:
            x = block(x, context.tokens, condition)  # (B*k, A, D)
        shift, scale = self.adaLN_modulation(F.silu(condition)).chunk(2, dim=1)  # 2 x (B*k, D)
        return self.out(modulate(self.norm(x), shift, scale))
