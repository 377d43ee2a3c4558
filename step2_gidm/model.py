"""GIDM: infer the latent action that links two frames about one second apart (Sec. 3.2, Alg. 1, Table 10).

o_t, o_{t+n} --DINOv2--> e_t, e_{t+n} --+
instruction ---T5------> tokens --------+--> encoder (spatio-temporal, causal) --> N queries of o_{t+n} --> VQ --> a
                                                                   e_t, a --> decoder (spatial) --> e_{t+n}, MSE
"""

from __future__ import annotations

import string
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from common.contracts import LatentAction, TrainableModel, TransitionBatch
from common.errors import UserError
from common.frozen import DinoV2, T5TextEncoder
from common.metrics import code_counts, perplexity
from step2_gidm.quantizer import Quantizer, QuantizerOutput
from step2_gidm.transformer import SpatialTransformer, SpatioTemporalTransformer, attention_weights

# B batch, N visual tokens of a frame, E their width, K latent-action tokens, d their width, C codes, L text tokens,
# D width of the transformers

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class InverseModel(TrainableModel):
    """What the inverse models of Table 7 share: frozen encoders, a bottleneck, the decoder and the objective.

    A subclass builds its encoder in `build_encoder` and applies it in `encode`. The defaults are the paper's
    (Table 10). What the paper leaves open follows UniVLA, on which A.3 says it builds: the number of heads and of
    queries and the depth of the decoder.

    Args:
        vision: frozen image encoder (DINOv2).
        text: frozen text encoder (T5).
        quantizer: the bottleneck, one of step2_gidm.quantizer.
        queries: K, the number of latent-action tokens.
        text_in: the parts that read the instruction. The paper names the encoder only; in the release the decoder
            reads it as well.
        clean_text: whether sentences are lower-cased and lose their punctuation. It is done here rather than in the
            data, so that pretraining and policies cannot differ.
        residual: whether the decoder predicts the change of the tokens, starting from no change. The release predicts
            the future tokens themselves and spends its first thousands of steps on copying the background.

    Raises UserError where `text_in` names an unknown part.
    """

    def __init__(
        self,
        *,
        vision: DinoV2,
        text: T5TextEncoder,
        quantizer: Quantizer,
        dim: int = 768,
        num_heads: int = 12,
        encoder_layers: int = 16,
        decoder_layers: int = 16,
        queries: int = 4,
        text_in: Collection[str] = ("encoder",),
        clean_text: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        unknown = set(text_in) - {"encoder", "decoder"}
        if unknown:
            raise UserError(f"text_in names {sorted(unknown)}; it may hold encoder and decoder")
        self.vision, self.text, self.quantizer = vision, text, quantizer
        self.embed_dim, self.num_tokens = vision.dim, vision.num_tokens
        self.num_action_tokens, self.num_codes = queries, quantizer.size or 0
        self.text_in, self.clean_text, self.residual = frozenset(text_in), clean_text, residual
        if text_in:
            self.text_proj = nn.Linear(text.dim, dim)
        self.to_latent = nn.Linear(dim, quantizer.dim)
        self.action_up = nn.Linear(quantizer.dim, self.embed_dim)
        self.patch_up = nn.Linear(self.embed_dim, self.embed_dim)
        self.decoder = SpatialTransformer(
            self.embed_dim,
            dim,
            out_dim=self.embed_dim,
            num_tokens=queries + self.num_tokens,
            num_layers=decoder_layers,
            num_heads=num_heads,
        )
        if residual:
            nn.init.zeros_(self.decoder.out.weight)
            nn.init.zeros_(self.decoder.out.bias)
        self.build_encoder(dim, num_layers=encoder_layers, num_heads=num_heads)

    def build_encoder(self, dim: int, *, num_layers: int, num_heads: int) -> None:
        """Create the modules and parameters that `encode` uses."""
        raise NotImplementedError

    def encode(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """Tokens (B, N, E) of the present and of the future, text (B, L, D) with its mask (B, L) -> (B, K, D)."""
        raise NotImplementedError

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, N, E) frozen visual tokens."""
        return self.vision(image)

    def embed_pair(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2, 3, H, W) in [0, 1] -> frozen visual tokens of the present and of the future, each (B, N, E)."""
        tokens = self.embed(rearrange(frames, "b t c h w -> (b t) c h w"))  # (2 B, N, E)
        now, future = rearrange(tokens, "(b t) n e -> t b n e", t=2)
        return now, future

    def infer(self, now: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        """Visual tokens (B, N, E) of two moments and B instructions -> K latent-action tokens."""
        z, bottleneck = self._encode_and_quantize(now, future, text)
        return LatentAction(z, bottleneck.quantized, bottleneck.loss, bottleneck.codes)

    def embed_action(self, quantized: Tensor) -> Tensor:
        """(B, K, d) -> (B, K, E): latent actions at the width of visual tokens."""
        return self.action_up(quantized)

    def decode(self, now: Tensor, quantized: Tensor, text: list[str] | None = None) -> Tensor:
        """Present tokens (B, N, E) and latent actions (B, K, d) -> predicted future tokens (B, N, E).

        `text` is needed, and read, only where `text_in` holds "decoder".
        """
        if self.decoder is None:
            raise ValueError("this inverse model has dropped its decoder; load the step 2 artifact to reconstruct")
        if "decoder" in self.text_in and text is None:
            raise ValueError("this model's decoder reads the instruction (text_in); pass text")
        words = self.encode_text(text) if "decoder" in self.text_in else (None, None)
        x = torch.cat([self.embed_action(quantized), self.patch_up(now)], dim=1)  # (B, K + N, E)
        predicted = self.decoder(x, *words)[:, quantized.shape[1] :]  # (B, N, E)
        return now + predicted if self.residual else predicted

    def encode_text(self, text: list[str]) -> tuple[Tensor, Tensor]:
        """B instructions -> text tokens (B, L, D) and their mask (B, L), True where there is a token."""
        if self.clean_text:
            text = [normalize_text(sentence) for sentence in text]
        tokens, mask = self.text(text)
        return self.text_proj(tokens), mask

    def drop_decoder(self) -> None:
        """Remove what only pretraining needs. A policy uses `embed`, `infer` and `embed_action` (A.3)."""
        self.decoder = self.patch_up = None

    def freeze_codebook(self) -> None:
        """Keep the codes of pretraining: from now on, the loss of the bottleneck only pulls latents towards them."""
        self.quantizer.freeze_codebook()

    def forward(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """The losses and metrics of Alg. 1, each a scalar, and `codes`.

        `copy_mse` is the error of predicting no change. `gap`, in eval mode only, is the rise of the error when each
        sample is decoded with the latent action of another sample of the batch. `codes` (K, C) counts how often each
        query used each code, for `metrics_from_counts`; a continuous bottleneck has none.
        """
        text = batch["text"]
        now, future = self.embed_pair(batch["frames"])  # (B, N, E) each
        _, action = self._encode_and_quantize(now, future, text)
        mse = F.mse_loss(self.decode(now, action.quantized, text).float(), future)
        out = {"loss": mse + action.loss, "mse": mse, "copy_mse": F.mse_loss(now, future), **action.stats}
        if action.codes is not None:
            out["codes"] = code_counts(action.codes, self.num_codes)  # (K, C)
        if not self.training:
            shuffled = self.decode(now, action.quantized.roll(1, dims=0), text).float()  # (B, N, E)
            out["gap"] = F.mse_loss(shuffled, future) - mse
        return out

    def metrics_from_counts(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """The share of codes in use and their perplexity, from the `codes` (K, C) summed over many batches.

        `usage` and `perplexity` are over all queries; `usage_0`, `perplexity_0` and so on are those of one query.
        """
        parts = {"": counts["codes"].sum(0)} | {f"_{query}": part for query, part in enumerate(counts["codes"])}
        measures = {"usage": lambda part: (part > 0).float().mean(), "perplexity": perplexity}
        return {
            f"{name}{suffix}": float(measure(part))
            for suffix, part in parts.items()
            for name, measure in measures.items()
        }

    def on_step_end(self, step: int, accelerator: Any = None) -> dict[str, float]:
        """Called after every optimizer step: the bottleneck may restart unused codes. Returns metrics to log."""
        return self.quantizer.on_step_end(step)

    def _encode_and_quantize(self, now: Tensor, future: Tensor, text: list[str]) -> tuple[Tensor, QuantizerOutput]:
        """Visual tokens (B, N, E) of two moments -> z (B, K, d) and what the bottleneck makes of it."""
        if now.shape != future.shape or now.shape[1:] != (self.num_tokens, self.embed_dim):
            raise ValueError(
                f"visual tokens must be (B, {self.num_tokens}, {self.embed_dim}) twice, got "
                f"{tuple(now.shape)} and {tuple(future.shape)}"
            )
        words = self.encode_text(text) if "encoder" in self.text_in else (None, None)
        z = self.to_latent(self.encode(now, future, *words))  # (B, K, d)
        return z, self.quantizer(z)


class GIDM(InverseModel):
    """The paper's inverse model: learnable queries join the tokens of both frames and are read at the future frame.

    The queries stand before the patches, as in UniVLA.
    """

    def build_encoder(self, dim: int, *, num_layers: int, num_heads: int) -> None:
        """See InverseModel."""
        self.queries = nn.Parameter(torch.empty(self.num_action_tokens, self.embed_dim).uniform_(-1, 1))
        self.encoder = SpatioTemporalTransformer(
            self.embed_dim,
            dim,
            num_tokens=self.num_action_tokens + self.num_tokens,
            num_layers=num_layers,
            num_heads=num_heads,
        )

    def encode(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """The queries of the future frame after the encoder, (B, K, D)."""
        return self.encode_frames(now, future, text, text_mask)[:, 1, : self.num_action_tokens]

    def encode_frames(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """Every token of both frames after the encoder, queries first: (B, 2, K + N, D)."""
        queries = repeat(self.queries, "k e -> b t k e", b=len(now), t=2).to(now.dtype)
        x = torch.cat([queries, torch.stack([now, future], dim=1)], dim=2)  # (B, 2, K + N, E)
        return self.encoder(x, text, text_mask)

    @torch.no_grad()
    def attention(self, now: Tensor, future: Tensor, text: list[str]) -> Tensor:
        """The attention of each query to the patches of the future frame in the last layer (Fig. 12): (B, K, N).

        It is the mean over the heads, and sums to one over the patches.
        """
        captured: dict[str, Any] = {}
        spatial = self.encoder.blocks[-1].spatial
        hook = spatial.register_forward_pre_hook(
            lambda _, args, kwargs: captured.update(x=args[0], **kwargs), with_kwargs=True
        )
        try:
            self._encode_and_quantize(now, future, text)
        finally:
            hook.remove()
        future_of = lambda rows: None if rows is None else rearrange(rows, "(b t) ... -> t b ...", t=2)[1]
        weights = attention_weights(spatial, future_of(captured["x"]), future_of(captured["key_mask"]))
        weights = weights.mean(1)  # (B, K + N + L, K + N + L)
        maps = weights[:, : self.num_action_tokens, self.num_action_tokens :][..., : self.num_tokens]  # (B, K, N)
        return maps / maps.sum(-1, keepdim=True)


def normalize_text(sentence: str) -> str:
    """Lower case, no punctuation, single spaces: the form in which UniVLA and the release give sentences to T5."""
    return " ".join(sentence.lower().translate(_NO_PUNCTUATION).split())
