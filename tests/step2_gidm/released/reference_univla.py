"""UniVLA's first-stage model as formulas over a dictionary of its tensors, which imported weights have to reproduce.

Softmax and position embeddings are written out. There is one sample at a time, so there is no padding. Names and shapes
are those of a published checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = 2


def random_weights(
    *, width: int, code_width: int, codes: int, queries: int, blocks: int, seed: int = 0
) -> dict[str, Tensor]:
    """All tensors of a lam-stage-1 checkpoint at another size, with random values."""
    shapes: dict[str, tuple[int, ...]] = {
        "action_latent": (1, 1, queries, width),
        "vq.codebook.weight": (codes, code_width),
    }

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    linear("to_codebook", code_width, width)
    linear("action_up", width, code_width)
    linear("patch_up", width, width)
    linear("lang_proj", width, width)
    linear("decoder.out", width, width)
    for side, attentions in (("encoder", ("spatial_attn", "temporal_attn")), ("decoder", ("spatial_attn",))):
        norm(f"{side}.ffn.0")
        linear(f"{side}.ffn.1", width, width)
        norm(f"{side}.ffn.2")
        for i in range(blocks):
            block = f"{side}.transformer_blocks.{i}"
            for attention in attentions:
                for part in ("to_q", "to_k", "to_v"):
                    linear(f"{block}.{attention}.{part}", width, width, bias=False)
                linear(f"{block}.{attention}.to_out.0", width, width)
            linear(f"{block}.ffn.0", 4 * width, width)
            linear(f"{block}.ffn.3", width, 4 * width)
            for number in range(len(attentions) + 1):
                norm(f"{block}.norm{number + 1}")
    generator = torch.Generator().manual_seed(seed)
    return {
        f"lam.{name}": torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        + (1.0 if ".norm" in name else 0.0)
        for name, shape in shapes.items()
    }


class ReferenceModel:
    """The formulas of the model over such a dictionary."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = {name.removeprefix("lam."): tensor for name, tensor in weights.items()}

    def encode(self, frames: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Visual tokens (2, N, D), words (L, D) -> encoder tokens (2, K + N + L, D), z (K, d), codes (K,)."""
        queries = self.w["action_latent"][0, 0]
        x = torch.stack([self._stem("encoder", torch.cat([queries, frame])) for frame in frames])
        x = torch.cat([x, self._linear("lang_proj", words).expand(2, -1, -1)], dim=1)
        for block in self._blocks("encoder"):
            x = x + torch.stack(
                [self._attend(f"{block}.spatial_attn", self._norm(f"{block}.norm1", frame)) for frame in x]
            )
            before = self._norm(f"{block}.norm2", x)
            x = x + torch.stack(
                [self._attend(f"{block}.temporal_attn", before[:, s], causal=True) for s in range(x.shape[1])], dim=1
            )
            x = x + self._ffn(block, self._norm(f"{block}.norm3", x))
        z = self._linear("to_codebook", x[1, : len(queries)])
        return x, z, (z[:, None] - self.w["vq.codebook.weight"]).square().sum(-1).argmin(1)

    def decode(self, now: Tensor, codes: Tensor, words: Tensor) -> Tensor:
        """Visual tokens (N, D) of the first frame, codes (K,), words (L, D) -> predicted tokens (N, D)."""
        actions = self._linear("action_up", self.w["vq.codebook.weight"][codes])
        x = self._stem("decoder", torch.cat([actions, self._linear("patch_up", now)]))
        x = torch.cat([x, self._linear("lang_proj", words)])
        for block in self._blocks("decoder"):
            x = x + self._attend(f"{block}.spatial_attn", self._norm(f"{block}.norm1", x))
            x = x + self._ffn(block, self._norm(f"{block}.norm2", x))
        return self._linear("decoder.out", x)[len(codes) : len(codes) + len(now)]

    def _blocks(self, side: str) -> list[str]:
        return list(
            dict.fromkeys(
                ".".join(name.split(".")[:3]) for name in self.w if name.startswith(f"{side}.transformer_blocks")
            )
        )

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _ffn(self, block: str, x: Tensor) -> Tensor:
        return self._linear(f"{block}.ffn.3", F.gelu(self._linear(f"{block}.ffn.0", x)))

    def _stem(self, side: str, x: Tensor) -> Tensor:
        x = self._norm(f"{side}.ffn.2", self._linear(f"{side}.ffn.1", self._norm(f"{side}.ffn.0", x)))
        place, width = torch.arange(len(x))[:, None], torch.arange(0, x.shape[1], 2)
        angle = place * 10000.0 ** (-width / x.shape[1])
        return x + torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    def _attend(self, name: str, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (
            self._linear(f"{name}.{part}", x).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for part in ("to_q", "to_k", "to_v")
        )
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            logits = logits + torch.full((len(x), len(x)), float("-inf")).triu(1)
        return self._linear(f"{name}.to_out.0", (logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
