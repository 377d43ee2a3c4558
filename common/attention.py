"""Attention, MLP, adaLN modulation and fixed position embeddings (Secs. 3.2-3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError


def sincos_pos_embed_1d(length: int, dim: int) -> Tensor:
    """(length, dim) table: first half sines, second half cosines, base 10000 (Vaswani et al., 2017)."""
    if dim % 2:
        raise UserError(f"sincos_pos_embed_1d needs an even width, got {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_pos_embed_2d(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim) raster table: the first half codes the row, the second the column."""
    if dim % 4:
        raise UserError(f"sincos_pos_embed_2d needs a width divisible by 4, got {dim}")
    rows = sincos_pos_embed_1d(height, dim // 2)[:, None].expand(height, width, -1)
    columns = sincos_pos_embed_1d(width, dim // 2)[None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=-1).reshape(height * width, dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: (B, N, D) scaled and shifted by per-sample (B, D) vectors."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, ratio: float = 4.0, *, bias: bool = True, out_dim: int | None = None) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, out_dim or dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention or cross-attention through SDPA.

    `qkv_bias` and `out_bias` follow the published weights: UniVLA's blocks have no bias on q, k, v and one on the
    output. `dropout` is the probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        context_dim: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise UserError(f"width {dim} does not split into {heads} heads")
        self.heads, self.dropout = heads, dropout
        inner = heads * (head_dim or dim // heads)
        context_dim = context_dim or dim
        self.to_q = nn.Linear(dim, inner, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, inner, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, inner, bias=qkv_bias)
        self.to_out = nn.Linear(inner, dim, bias=out_bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """x (B, N, D), context (B, S, D') or x itself, key_mask (B, S) with True where a key counts -> (B, N, D)."""
        context = x if context is None else context
        q, k, v = (
            self._split(project(y)) for project, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )  # (B, heads, N | S, head_dim)
        mask = None if key_mask is None else key_mask[:, None, None]
        if causal and mask is not None:
            mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril()
        if q.device.type == "cpu":  # the CPU's fused kernel is several times slower in bf16 than in fp32
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(q.device.type, enabled=q.device.type != "cpu" and torch.is_autocast_enabled(q.device.type)):
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=causal and mask is None,
                dropout_p=self.dropout if self.training else 0.0,
            )
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
