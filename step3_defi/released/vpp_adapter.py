"""VPP's action transformer, which the release keeps: an encoder over the context, a decoder over the actions.

Source: Hu et al., 2024. B batch, k noise draws of a sample, A actions, S context tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention import Attention, Mlp
from step3_defi.adapter import Context, SigmaEmbedder


def scale_and_shift(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The release's adaLN: (B, A, D) times `scale` (B, D), where common.attention.modulate multiplies by 1 + scale."""
    return x * scale[:, None] + shift[:, None]


class TransformerLayer(nn.Module):
    """The modules that an encoder and a decoder layer share: pre-norm self-attention and MLP.

    Only the projections to queries, keys and values have biases.
    """

    def __init__(
        self, dim: int, num_heads: int, *, attention_dropout: float, residual_dropout: float, mlp_dropout: float
    ) -> None:
        super().__init__()
        self.norm_self, self.norm_mlp = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.self_attention = Attention(dim, num_heads, qkv_bias=True, out_bias=False, dropout=attention_dropout)
        self.mlp = Mlp(dim, bias=False)
        self.drop, self.drop_mlp = nn.Dropout(residual_dropout), nn.Dropout(mlp_dropout)


class EncoderLayer(TransformerLayer):
    """Self-attention of all context tokens, and MLP."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.drop(self.self_attention(self.norm_self(x)))
        return x + self.drop_mlp(self.mlp(self.norm_mlp(x)))


class DecoderLayer(TransformerLayer):
    """Causal self-attention, causal cross-attention, and MLP; the noise level modulates the first and the last."""

    def __init__(
        self, dim: int, num_heads: int, *, attention_dropout: float, residual_dropout: float, mlp_dropout: float
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            attention_dropout=attention_dropout,
            residual_dropout=residual_dropout,
            mlp_dropout=mlp_dropout,
        )
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads, qkv_bias=True, out_bias=False, dropout=attention_dropout)
        self.adaLN_modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        """x (B*k, A, D), context (B*k, S, D), condition (B*k, D) -> (B*k, A, D)."""
        shift_self, scale_self, gate_self, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            F.silu(condition)
        ).chunk(6, dim=1)  # 6 x (B*k, D)
        modulated = scale_and_shift(self.norm_self(x), shift_self, scale_self)
        x = x + gate_self[:, None] * self.drop(self.self_attention(modulated, causal=True))  # (B*k, A, D)
        x = x + self.drop(self.cross_attention(self.norm_cross(x), context, causal=True))  # (B*k, A, D)
        modulated = scale_and_shift(self.norm_mlp(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * self.drop_mlp(self.mlp(modulated))


class VPPAdapter(nn.Module):
    """4 + 4 layers of width 384 at full scale; a drop-in for adapter.ActionAdapter.

    There are no position embeddings. The causal flag of the decoder also applies to its cross-attention, so that action
    i attends to the context tokens 0..i only; published weights were trained that way. The context has been mixed by
    the encoder before: the decoder reads the goal and the first A - 1 video tokens, and latent actions reach it through
    the encoder alone.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[int, int]],
        goal_dim: int,
        *,
        dim: int = 384,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        num_heads: int = 8,
        action_horizon: int = 10,
        action_dim: int = 7,
        attention_dropout: float = 0.3,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.05,
    ) -> None:
        super().__init__()
        self.action_horizon, self.action_dim = action_horizon, action_dim
        dropouts = {
            "attention_dropout": attention_dropout,
            "residual_dropout": residual_dropout,
            "mlp_dropout": mlp_dropout,
        }
        self.goal_embedder = nn.Sequential(nn.Linear(goal_dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.stream_embedders = nn.ModuleDict({name: nn.Linear(width, dim) for name, (_, width) in streams.items()})
        self.encoder = nn.ModuleList(EncoderLayer(dim, num_heads, **dropouts) for _ in range(encoder_layers))
        self.encoder_norm = nn.LayerNorm(dim, bias=False)
        self.action_embedder = nn.Linear(action_dim, dim)
        self.sigma_embedder = SigmaEmbedder(dim)
        self.decoder = nn.ModuleList(DecoderLayer(dim, num_heads, **dropouts) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.out = nn.Linear(dim, action_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, goal: Tensor, streams: Mapping[str, Tensor]) -> Context:
        """Sentence's feature (B, goal_dim), name -> tokens (B, n, width) -> the A tokens that the decoder can see."""
        if streams.keys() != self.stream_embedders.keys():
            raise ValueError(f"the adapter reads streams {sorted(self.stream_embedders)}, got {sorted(streams)}")
        goal = self.goal_embedder(goal)  # (B, D)
        tokens = [embed(streams[name]) for name, embed in self.stream_embedders.items()]
        x = torch.cat([goal[:, None], *tokens], dim=1)  # (B, S, D)
        for layer in self.encoder:
            x = layer(x)  # (B, S, D)
        return Context(self.encoder_norm(x)[:, : self.action_horizon], goal)

    def forward(self, noisy: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Scaled noisy actions (B*k, A, 7), the k draws of a sample in a row, sigma (B*k,) -> output (B*k, A, 7)."""
        tokens = context.tokens.repeat_interleave(len(noisy) // len(context.tokens), dim=0)  # (B*k, A, D)
        condition = self.sigma_embedder(sigma)  # (B*k, D)
        x = self.action_embedder(noisy)  # (B*k, A, D)
        for layer in self.decoder:
            x = layer(x, tokens, condition)  # (B*k, A, D)
        return self.out(self.norm(x))
