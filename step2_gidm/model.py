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
from torch import Tensor, nn

from common.contracts import LatentAction, TransitionBatch
from common.frozen import DinoV2, T5TextEncoder
from common.metrics import code_counts, perplexity
from step2_gidm.quantizer import Quantizer, QuantizerOutput
from step2_gidm.transformer import SpatialTransformer, SpatioTemporalTransformer, attention_weights

# B batch, N visual tokens of a frame, E their width, K latent-action tokens, d their width, L text tokens, D model
# width

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class InverseModel(nn.Module):
    """What every inverse model of Table 7 shares: frozen eyes and text, a bottleneck, the decoder and the objective.

    A subclass says in `encode` how two moments become K vectors of width `read_dim`. `text_in` names the parts that
    read
    the instruction: the paper's encoder only, or encoder and decoder as in the release. With `clean_text` sentences
    are lower-cased and lose their punctuation here, so that pretraining and policies cannot differ. With `residual` the
    decoder predicts what changes and starts from no change; the release predicts the future tokens outright, and
    spends its first thousands of steps on copying the background.
    """

    def __init__(
        self,
        *,
        vision: DinoV2,
        text: T5TextEncoder,
        quantizer: Quantizer,
        dim: int,
        heads: int,
        decoder_layers: int,
        queries: int,
        text_in: Collection[str],
        clean_text: bool,
        residual: bool,
        read_dim: int,
    ) -> None:
        super().__init__()
        unknown = set(text_in) - {"encoder", "decoder"}
        if unknown:
            raise ValueError(f"text_in names {sorted(unknown)}; it may hold encoder and decoder")
        self.vision, self.text, self.quantizer = vision, text, quantizer
        self.embed_dim, self.num_tokens = vision.dim, vision.num_tokens
        self.num_action_tokens, self.latent_dim, self.num_codes = queries, quantizer.dim, quantizer.size or 0
        self.text_in, self.clean_text, self.residual = frozenset(text_in), clean_text, residual
        if text_in:
            self.text_proj = nn.Linear(text.dim, dim)
        self.to_latent = nn.Linear(read_dim, quantizer.dim)
        self.action_up = nn.Linear(quantizer.dim, self.embed_dim)
        self.patch_up = nn.Linear(self.embed_dim, self.embed_dim)
        self.decoder = SpatialTransformer(
            self.embed_dim,
            dim,
            out_dim=self.embed_dim,
            tokens=queries + self.num_tokens,
            layers=decoder_layers,
            heads=heads,
        )
        if residual:
            nn.init.zeros_(self.decoder.out.weight)
            nn.init.zeros_(self.decoder.out.bias)

    def encode(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """(B, N, E) twice, text (B, L, D) with mask (B, L) -> (B, K, read_dim)."""
        raise NotImplementedError

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, N, E) frozen visual tokens."""
        return self.vision(image)

    def infer(self, now: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        """Visual tokens (B, N, E) of two moments and B instructions -> K latent-action tokens."""
        z, bottleneck = self._infer(now, future, text)
        return LatentAction(z, bottleneck.quantized, bottleneck.loss, bottleneck.codes)

    def embed_action(self, quantized: Tensor) -> Tensor:
        """(B, K, d) -> (B, K, E): latent actions at the width of visual tokens."""
        return self.action_up(quantized)

    def decode(self, now: Tensor, quantized: Tensor, text: list[str] | None = None) -> Tensor:
        """Current tokens (B, N, E) and latent actions (B, K, d) -> predicted future tokens (B, N, E).

        `text` is read only where `text_in` holds "decoder", and is needed there.
        """
        if self.decoder is None:
            raise ValueError("this inverse model has dropped its decoder; load the step 2 artifact to reconstruct")
        if "decoder" in self.text_in and text is None:
            raise ValueError("this model's decoder reads the instruction (text_in); pass text")
        words = self._read(text) if "decoder" in self.text_in else (None, None)
        tokens = torch.cat([self.embed_action(quantized), self.patch_up(now)], dim=1)
        predicted = self.decoder(tokens, *words)[:, quantized.shape[1] :]
        return now + predicted if self.residual else predicted

    def drop_decoder(self) -> None:
        """Drop what only pretraining needs; a policy keeps `embed`, `infer` and `lift` (A.3)."""
        self.decoder = self.patch_up = None

    def freeze_codebook(self) -> None:
        """Keep the codes that pretraining made: finetuning only draws latents to them."""
        self.quantizer.freeze_codebook()

    def forward(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Losses and statistics of Alg. 1. `copy_mse` is the error of predicting no change; in eval mode `gap` is how
        much
        the error rises when latent actions are dealt to other samples of the batch. `codes` (K, C) counts them by
        query, for
        `metrics_from_counts`, where there are codes."""
        frames, text = batch["frames"], batch["text"]
        now, future = self.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(1)
        _, action = self._infer(now, future, text)
        mse = F.mse_loss(self.decode(now, action.quantized, text).float(), future)
        out = {"loss": mse + action.loss, "mse": mse, "copy_mse": F.mse_loss(now, future), **action.stats}
        if action.codes is not None:
            out["codes"] = code_counts(action.codes, self.num_codes)
        if not self.training:
            shuffled = self.decode(now, action.quantized.roll(1, dims=0), text).float()
            out["gap"] = F.mse_loss(shuffled, future) - mse
        return out

    def metrics_from_counts(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """From the `codes` (K, C) of many batches: share of the codes in use and perplexity, over all queries and by
        query (`usage_0`, ...)."""
        parts = {"": counts["codes"].sum(0)} | {f"_{query}": part for query, part in enumerate(counts["codes"])}
        measures = {"usage": lambda part: (part > 0).float().mean(), "perplexity": perplexity}
        return {
            f"{name}{end}": float(measure(part)) for end, part in parts.items() for name, measure in measures.items()
        }

    def on_step_end(self, step: int, accelerator: Any = None) -> dict[str, float]:
        """After every optimizer step: the bottleneck may restart dead codes, on a schedule of steps."""
        return self.quantizer.on_step_end(step)

    def _infer(self, now: Tensor, future: Tensor, text: list[str]) -> tuple[Tensor, QuantizerOutput]:
        if now.shape != future.shape or now.shape[1:] != (self.num_tokens, self.embed_dim):
            raise ValueError(
                f"visual tokens must be (B, {self.num_tokens}, {self.embed_dim}) twice, got "
                f"{tuple(now.shape)} and {tuple(future.shape)}"
            )
        words = self._read(text) if "encoder" in self.text_in else (None, None)
        z = self.to_latent(self.encode(now, future, *words))
        return z, self.quantizer(z)

    def _read(self, text: list[str]) -> tuple[Tensor, Tensor]:
        if self.clean_text:
            text = [normalize_text(sentence) for sentence in text]
        tokens, mask = self.text(text)
        return self.text_proj(tokens), mask


class GIDM(InverseModel):
    """The paper's inverse model: learnable queries beside both frames, read at the future frame, vector-quantized.

    Defaults are the paper's (Table 10); what it leaves open follows UniVLA, on which A.3 says it builds: heads,
    queries,
    depth of the decoder, and the queries' place (before the patches of both frames).
    """

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
        self.encoder = SpatioTemporalTransformer(
            self.embed_dim, dim, tokens=queries + self.num_tokens, layers=encoder_layers, heads=heads
        )

    def encode(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """The queries of the future frame after the encoder, (B, K, D)."""
        return self.encode_frames(now, future, text, text_mask)[:, 1, : self.num_action_tokens]

    def encode_frames(self, now: Tensor, future: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """Every token of both frames after the encoder, queries first: (B, 2, K + N, D)."""
        queries = self.queries.expand(len(now), 2, -1, -1).to(now.dtype)
        return self.encoder(torch.cat([queries, torch.stack([now, future], dim=1)], dim=2), text, text_mask)

    @torch.no_grad()
    def attention(self, now: Tensor, future: Tensor, text: list[str], *, layer: int = -1) -> Tensor:
        """Where the queries look in the future frame (Fig. 12): (B, K, N), mean over heads, sums to one over
        patches."""
        seen: dict[str, Any] = {}
        spatial = self.encoder.blocks[layer].spatial
        hook = spatial.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(x=args[0], **kwargs), with_kwargs=True
        )
        try:
            self._infer(now, future, text)
        finally:
            hook.remove()
        mask = (
            None if seen["key_mask"] is None else seen["key_mask"][1::2]
        )  # frames alternate: the odd rows are o_{t+n}
        weights = attention_weights(spatial, seen["x"][1::2], mask).mean(1)
        maps = weights[:, : self.num_action_tokens, self.num_action_tokens : self.num_action_tokens + self.num_tokens]
        return maps / maps.sum(-1, keepdim=True)


def normalize_text(sentence: str) -> str:
    """Lower case, no punctuation, single spaces: how the lineage feeds T5."""
    return " ".join(sentence.lower().translate(_NO_PUNCTUATION).split())
