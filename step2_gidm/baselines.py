"""The inverse models that Table 7 compares with GIDM, behind the same protocol.

The paper names them and no more. Ours keep its objective, decoder and text, and drop what they are there to test: the
causal spatio-temporal encoder, and (by configuration) vector quantization.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from common.attention import Mlp
from common.frozen import DinoV2, T5TextEncoder
from step2_gidm.model import InverseModel
from step2_gidm.quantizer import Quantizer
from step2_gidm.transformer import SpatialTransformer


class MLPInverse(InverseModel):
    """Table 7, MLP: "directly maps concatenated current and future state embeddings to actions".

    `encoder_layers` residual MLPs read each patch at both moments, [e_t ; e_{t+n}]; the mean over patches joins the
    mean
    over the instruction, and a last MLP makes K latent actions of it.
    """

    def __init__(
        self,
        *,
        vision: DinoV2,
        text: T5TextEncoder,
        quantizer: Quantizer,
        dim: int = 768,
        heads: int = 12,
        encoder_layers: int = 2,
        decoder_layers: int = 16,
        queries: int = 4,
        text_in: Collection[str] = ("encoder",),
        clean_text: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__(
            vision=vision,
            text=text,
            quantizer=quantizer,
            dim=dim,
            heads=heads,
            decoder_layers=decoder_layers,
            queries=queries,
            text_in=text_in,
            clean_text=clean_text,
            residual=residual,
            read_dim=dim,
        )
        self.stem = nn.Sequential(nn.LayerNorm(2 * self.embed_dim), nn.Linear(2 * self.embed_dim, dim))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), Mlp(dim)) for _ in range(encoder_layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), Mlp(dim, out_dim=queries * dim))

    def encode(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """(B, K, D)."""
        pairs = self.stem(torch.cat([now, future], dim=-1))
        for block in self.blocks:
            pairs = pairs + block(pairs)
        state = pairs.mean(1)
        if text is not None:
            share = (text_mask / text_mask.sum(1, keepdim=True))[..., None]
            state = state + (text * share).sum(1)
        return self.head(state).unflatten(1, (self.num_action_tokens, -1))


class TransformerInverse(InverseModel):
    """Table 7, Transformer: plain full attention over [queries ; e_t ; e_{t+n} ; instruction], no causal mask."""

    def __init__(
        self,
        *,
        vision: DinoV2,
        text: T5TextEncoder,
        quantizer: Quantizer,
        dim: int = 768,
        heads: int = 12,
        encoder_layers: int = 16,
        decoder_layers: int = 16,
        queries: int = 4,
        text_in: Collection[str] = ("encoder",),
        clean_text: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__(
            vision=vision,
            text=text,
            quantizer=quantizer,
            dim=dim,
            heads=heads,
            decoder_layers=decoder_layers,
            queries=queries,
            text_in=text_in,
            clean_text=clean_text,
            residual=residual,
            read_dim=dim,
        )
        self.queries = nn.Parameter(torch.empty(queries, self.embed_dim).uniform_(-1, 1))
        self.encoder = SpatialTransformer(
            self.embed_dim, dim, out_dim=dim, tokens=queries + 2 * self.num_tokens, layers=encoder_layers, heads=heads
        )

    def encode(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """(B, K, D)."""
        queries = self.queries.expand(len(now), -1, -1).to(now.dtype)
        return self.encoder(torch.cat([queries, now, future], dim=1), text, text_mask)[:, : self.num_action_tokens]
