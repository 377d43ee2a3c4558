"""VPP's action transformer, which the release keeps: an encoder over the context, a decoder over the actions (Hu et
al., 2024).

B batch, k noise draws of a sample, A actions, S context tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention import Attention, Mlp
from step3_defi.adapter import Context, SigmaEmbedder


def scale_and_shift(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN of the release: a plain factor where common.attention has one plus it."""
    return x * scale[:, None] + shift[:, None]


class TransformerLayer(nn.Module):
    """What an encoder and a decoder layer share: pre-norm self-attention and MLP without biases (q, k and v have
    theirs)."""

    def __init__(
        self, dim: int, heads: int, *, attention_dropout: float, residual_dropout: float, mlp_dropout: float
    ) -> None:
        super().__init__()
        self.norm_self, self.norm_mlp = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.self_attention = Attention(dim, heads, qkv_bias=True, out_bias=False, dropout=attention_dropout)
        self.mlp = Mlp(dim, bias=False)
        self.drop, self.drop_mlp = nn.Dropout(residual_dropout), nn.Dropout(mlp_dropout)


class EncoderLayer(TransformerLayer):
    """Every context token reads every other."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.drop(self.self_attention(self.norm_self(x)))
        return x + self.drop_mlp(self.mlp(self.norm_mlp(x)))


class DecoderLayer(TransformerLayer):
    """Causal self-attention and MLP under adaLN of the noise level, causal cross-attention between them."""

    def __init__(
        self, dim: int, heads: int, *, attention_dropout: float, residual_dropout: float, mlp_dropout: float
    ) -> None:
        super().__init__(
            dim, heads, attention_dropout=attention_dropout, residual_dropout=residual_dropout, mlp_dropout=mlp_dropout
        )
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, heads, qkv_bias=True, out_bias=False, dropout=attention_dropout)
        self.adaLN_modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        """x (B*k, A, D), context (B*k, S, D), condition (B*k, D) -> (B*k, A, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(F.silu(condition)).chunk(6, dim=1)
        x = x + gate1[:, None] * self.drop(
            self.self_attention(scale_and_shift(self.norm_self(x), shift1, scale1), causal=True)
        )
        x = x + self.drop(self.cross_attention(self.norm_cross(x), context, causal=True))
        return x + gate2[:, None] * self.drop_mlp(self.mlp(scale_and_shift(self.norm_mlp(x), shift2, scale2)))


class VPPAdapter(nn.Module):
    """4 + 4 layers of width 384 at full scale; stands where adapter.ActionAdapter does, of the same streams.

    Nothing has a position. Action i attends to the context tokens 0..i only: the causal flag of the decoder also
    reaches its
    cross-attention, and published weights have learned with it. So of the context, which the encoder has mixed, the
    decoder
    reads the goal and the first A - 1 video tokens, and latent actions reach it through the encoder alone.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[int, int]],
        goal_dim: int,
        *,
        dim: int = 384,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        heads: int = 8,
        horizon: int = 10,
        action_dim: int = 7,
        attention_dropout: float = 0.3,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.05,
    ) -> None:
        super().__init__()
        self.horizon, self.action_dim = horizon, action_dim
        dropouts = {
            "attention_dropout": attention_dropout,
            "residual_dropout": residual_dropout,
            "mlp_dropout": mlp_dropout,
        }
        self.goal = nn.Sequential(nn.Linear(goal_dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.streams = nn.ModuleDict({name: nn.Linear(width, dim) for name, (_, width) in streams.items()})
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, **dropouts) for _ in range(encoder_layers))
        self.encoder_norm = nn.LayerNorm(dim, bias=False)
        self.action_embedder = nn.Linear(action_dim, dim)
        self.sigma_embedder = SigmaEmbedder(dim)
        self.decoder = nn.ModuleList(DecoderLayer(dim, heads, **dropouts) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.out = nn.Linear(dim, action_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, goal: Tensor, streams: Mapping[str, Tensor]) -> Context:
        """Sentence feature (B, goal_dim) and name -> (B, tokens, width) -> what the decoder can see of the encoded
        context."""
        if streams.keys() != self.streams.keys():
            raise ValueError(f"the adapter reads streams {sorted(self.streams)}, got {sorted(streams)}")
        goal = self.goal(goal)
        x = torch.cat([goal[:, None], *(embed(streams[name]) for name, embed in self.streams.items())], dim=1)
        for layer in self.encoder:
            x = layer(x)
        return Context(self.encoder_norm(x)[:, : self.horizon], goal)

    def forward(self, noisy: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Scaled noisy actions (B*k, A, 7), the k draws of a sample in a row, and sigma (B*k,) -> network output (B*k,
        A, 7)."""
        tokens = context.tokens.repeat_interleave(len(noisy) // len(context.tokens), dim=0)
        condition, x = self.sigma_embedder(sigma), self.action_embedder(noisy)
        for layer in self.decoder:
            x = layer(x, tokens, condition)
        return self.out(self.norm(x))
