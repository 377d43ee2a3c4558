"""The inverse models that Table 7 compares with GIDM. They have the same interface.

The paper only names them. Ours keep GIDM's objective, decoder and text, and leave out what the comparison tests: the
causal spatio-temporal encoder and, by configuration, vector quantization.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from common.attention import Mlp
from step2_gidm.model import InverseModel
from step2_gidm.transformer import SpatialTransformer

# B batch, N visual tokens of a frame, E their width, K latent-action tokens, L text tokens, D width


class MLPInverse(InverseModel):
    """Table 7, MLP: "directly maps concatenated current and future state embeddings to actions".

    Residual MLPs, `encoder_layers` of them, read each patch at both moments, [e_t ; e_{t+n}]. The mean over the patches
    is added to the mean over the instruction, and a last MLP makes the K latent actions of the sum.
    """

    def build_encoder(self, dim: int, *, num_layers: int, num_heads: int) -> None:
        """See InverseModel. There is no attention here, so `num_heads` is that of the decoder alone."""
        self.stem = nn.Sequential(nn.LayerNorm(2 * self.embed_dim), nn.Linear(2 * self.embed_dim, dim))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), Mlp(dim)) for _ in range(num_layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), Mlp(dim, out_dim=self.num_action_tokens * dim))

    def encode(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """See InverseModel, (B, K, D)."""
        x = self.stem(torch.cat([now, future], dim=-1))  # (B, N, D)
        for block in self.blocks:
            x = x + block(x)  # (B, N, D)
        x = x.mean(1)  # (B, D)
        if text is not None:
            weights = text_mask / text_mask.sum(1, keepdim=True)  # (B, L)
            x = x + (text * weights[..., None]).sum(1)  # (B, D)
        return rearrange(self.head(x), "b (k d) -> b k d", k=self.num_action_tokens)


class TransformerInverse(InverseModel):
    """Table 7, Transformer: plain full attention over [queries ; e_t ; e_{t+n} ; instruction], no causal mask."""

    def build_encoder(self, dim: int, *, num_layers: int, num_heads: int) -> None:
        """See InverseModel."""
        self.queries = nn.Parameter(torch.empty(self.num_action_tokens, self.embed_dim).uniform_(-1, 1))
        self.encoder = SpatialTransformer(
            self.embed_dim,
            dim,
            out_dim=dim,
            num_tokens=self.num_action_tokens + 2 * self.num_tokens,
            num_layers=num_layers,
            num_heads=num_heads,
        )

    def encode(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """See InverseModel, (B, K, D)."""
        queries = repeat(self.queries, "k e -> b k e", b=len(now)).to(now.dtype)
        x = torch.cat([queries, now, future], dim=1)  # (B, K + 2 N, E)
        return self.encoder(x, text, text_mask)[:, : self.num_action_tokens]  # (B, K, D)
