"""The release's policy as formulas over its published parameter names, which an imported policy must reproduce.

One sample at a time, softmax spelled out. Names and shapes are those of a published checkpoint; without an inverse
model it is VPP's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.step2_gidm.released import reference_univla

FORMER, INNER = "Video_Former", "model.inner_model"


def random_policy(
    *,
    features: int,
    frames: int,
    queries: int,
    dim: int,
    former_inner: int,
    width: int,
    visual: int,
    goal: int,
    layers: int,
    inverse: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensors of a policy's checkpoint at another size.

    `dim` is the width of the video former, `width` that of the action transformer (384 both in VPP), and `visual` that
    of the inverse model (768).
    """
    shapes: dict[str, tuple[int, ...]] = {
        f"{FORMER}.latents": (frames, queries, dim),
        f"{FORMER}.time_pos_emb": (frames, 1, dim),
        f"{INNER}.pos_emb": (1, 3, width),
        "language_goal.clip_rn50.logit_scale": (),
        "TVP_encoder.text_encoder.x": (5,),
    }

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, size: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (size,)
        if bias:
            shapes[f"{name}.bias"] = (size,)

    linear(f"{FORMER}.goal_emb.0", 2 * dim, features)
    linear(f"{FORMER}.goal_emb.2", dim, 2 * dim)
    norm(f"{FORMER}.norm", dim)
    for i in range(layers):
        layer = f"{FORMER}.layers.{i}"
        norm(f"{layer}.0.norm_media", dim)
        norm(f"{layer}.0.norm_latents", dim)
        for part in ("to_q", "to_k", "to_v"):
            linear(f"{layer}.0.{part}", former_inner, dim, bias=False)
        linear(f"{layer}.0.to_out", dim, former_inner, bias=False)
        linear(f"{layer}.1.qkv", 3 * dim, dim)
        linear(f"{layer}.1.proj", dim, dim)
        norm(f"{layer}.2.0", dim)
        linear(f"{layer}.2.1", 4 * dim, dim, bias=False)
        linear(f"{layer}.2.3", dim, 4 * dim, bias=False)
    for name, into in (("goal_emb", goal), ("lang_emb", goal), ("proprio_emb", 8)):
        linear(f"{INNER}.{name}.0", 2 * width, into)
        linear(f"{INNER}.{name}.2", width, 2 * width)
    linear(f"{INNER}.sigma_emb.1", 2 * width, width)
    linear(f"{INNER}.sigma_emb.3", width, 2 * width)
    linear(f"{INNER}.tok_emb", width, dim)
    linear(f"{INNER}.action_emb", width, 7)
    linear(f"{INNER}.action_pred", 7, width)
    for side, attentions in (("encoder", ("attn",)), ("decoder", ("attn", "cross_att"))):
        norm(f"{INNER}.{side}.ln", width, bias=False)
        for i in range(layers):
            block = f"{INNER}.{side}.blocks.{i}"
            norm(f"{block}.ln_1", width, bias=False)
            norm(f"{block}.ln_2", width, bias=False)
            linear(f"{block}.mlp.c_fc", 4 * width, width, bias=False)
            linear(f"{block}.mlp.c_proj", width, 4 * width, bias=False)
            for attention in attentions:
                for part in ("key", "query", "value"):
                    linear(f"{block}.{attention}.{part}", width, width)
                linear(f"{block}.{attention}.c_proj", width, width, bias=False)
            if side == "decoder":
                norm(f"{block}.ln3", width)
                linear(f"{block}.adaLN_zero.modulation.1", 6 * width, width)
    weights = {}
    if inverse:
        shapes["time_pos_emb"] = (2, 1, visual)
        linear("goal_emb.0", visual, features)
        linear("goal_emb.2", visual, visual)
        linear(f"{INNER}.tok_emb_token", width, visual)
        lam = reference_univla.random_weights(width=visual, code_width=16, codes=8, queries=4, blocks=layers)
        weights = {
            name: tensor for name, tensor in lam.items() if not name.startswith(("lam.decoder.", "lam.patch_up."))
        }
        weights["lam.text_encoder.shared.weight"] = torch.ones(3, 4)
    generator = torch.Generator().manual_seed(seed)
    return weights | {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        + (1.0 if _is_norm(name) else 0.0)
        for name, shape in shapes.items()
    }


def _is_norm(name: str) -> bool:
    return any(part in name for part in (".norm", ".ln", ".2.0.")) and name.endswith("weight")


class ReferenceModel:
    """The formulas of the policy. `heads`: of the video former's two attentions and of the action transformer."""

    def __init__(self, weights: dict[str, Tensor], heads: tuple[int, int, int]) -> None:
        self.w, self.heads = weights, heads
        self.lam = reference_univla.ReferenceModel(
            {name: tensor for name, tensor in weights.items() if name.startswith("lam.")}
        )

    def sample(
        self, features: Tensor, goal: Tensor, words: Tensor, noise: Tensor, *, future: int, steps: int = 10
    ) -> Tensor:
        """Features (V, F, L, C), static view first, goal (G,), words (L, E), unit noise (A, 7) -> actions (A, 7)."""
        context = self.context(
            goal, self.video(torch.cat(list(features), dim=1)), self.latent(features[0, 0], features[0, future], words)
        )
        levels = [math.exp(math.log(80) + (math.log(1.0) - math.log(80)) * i / (steps - 1)) for i in range(steps)] + [
            0.0
        ]
        x = 80 * noise
        for now, following in zip(levels[:-1], levels[1:]):
            total = now**2 + 0.25
            clean = 0.25 / total * x + now * 0.5 / total**0.5 * self.decode(x / total**0.5, now, context)
            x = following / now * x + (1 - following / now) * clean
        return x

    def video(self, frames: Tensor) -> Tensor:
        """(F, V*L, C) -> (F*Q, D)."""
        x = self._mlp(f"{FORMER}.goal_emb", frames) + self.w[f"{FORMER}.time_pos_emb"]
        queries = self.w[f"{FORMER}.latents"]
        for i in range(self._count(f"{FORMER}.layers")):
            layer = f"{FORMER}.layers.{i}"
            seen, asked = self._norm(f"{layer}.0.norm_media", x), self._norm(f"{layer}.0.norm_latents", queries)
            both = torch.cat([seen, asked], dim=1)
            read = torch.stack(
                [
                    self._attend(
                        *(self._linear(f"{layer}.0.to_{part}", y) for part, y in (("q", a), ("k", b), ("v", b))),
                        self.heads[0],
                    )
                    for a, b in zip(asked, both)
                ]
            )
            queries = queries + self._linear(f"{layer}.0.to_out", read)
            q, k, v = self._linear(f"{layer}.1.qkv", queries).transpose(0, 1).chunk(3, dim=-1)  # (Q, F, D)
            across = torch.stack([self._attend(a, b, c, self.heads[1]) for a, b, c in zip(q, k, v)], dim=1)
            queries = queries + self._linear(f"{layer}.1.proj", across)
            inner = self._linear(f"{layer}.2.1", self._norm(f"{layer}.2.0", queries))
            queries = queries + self._linear(f"{layer}.2.3", F.gelu(inner))
        return self._norm(f"{FORMER}.norm", queries).flatten(0, 1)

    def infer(self, now: Tensor, future: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Features (L, C) of two imagined frames, words (L, E) -> input of the bottleneck (K, d), codes (K,)."""
        moments = torch.stack([self._mlp("goal_emb", now), self._mlp("goal_emb", future)]) + self.w["time_pos_emb"]
        return self.lam.encode(moments, words)[1:]

    def latent(self, now: Tensor, future: Tensor, words: Tensor) -> Tensor | None:
        """As `infer` -> latent actions (K, E); none without an inverse model."""
        if "time_pos_emb" not in self.w:
            return None
        _, codes = self.infer(now, future, words)
        return F.linear(
            self.w["lam.vq.codebook.weight"][codes], self.w["lam.action_up.weight"], self.w["lam.action_up.bias"]
        )

    def context(self, goal: Tensor, video: Tensor, latent: Tensor | None) -> Tensor:
        """Goal (G,), video tokens and latent actions -> encoded context (S, W)."""
        parts = [self._mlp(f"{INNER}.lang_emb", goal[None]), self._linear(f"{INNER}.tok_emb", video)]
        x = torch.cat(parts if latent is None else [*parts, self._linear(f"{INNER}.tok_emb_token", latent)])
        for i in range(self._count(f"{INNER}.encoder.blocks")):
            block = f"{INNER}.encoder.blocks.{i}"
            x = x + self._attention(f"{block}.attn", *[self._norm(f"{block}.ln_1", x)] * 2)
            x = x + self._feed(block, self._norm(f"{block}.ln_2", x))
        return self._norm(f"{INNER}.encoder.ln", x)

    def decode(self, actions: Tensor, sigma: float, context: Tensor) -> Tensor:
        """Scaled noisy actions (A, 7) -> network output (A, 7)."""
        half = self.w[f"{INNER}.sigma_emb.1.weight"].shape[1] // 2
        angle = math.log(sigma) / 4 * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        level = self._linear(
            f"{INNER}.sigma_emb.3", F.mish(self._linear(f"{INNER}.sigma_emb.1", torch.cat([angle.sin(), angle.cos()])))
        )
        x = self._linear(f"{INNER}.action_emb", actions)
        for i in range(self._count(f"{INNER}.decoder.blocks")):
            block = f"{INNER}.decoder.blocks.{i}"
            shift1, scale1, gate1, shift2, scale2, gate2 = self._linear(
                f"{block}.adaLN_zero.modulation.1", F.silu(level)
            ).chunk(6)
            x = x + gate1 * self._attention(
                f"{block}.attn", *[shift1 + scale1 * self._norm(f"{block}.ln_1", x)] * 2, causal=True
            )
            x = x + self._attention(f"{block}.cross_att", self._norm(f"{block}.ln3", x), context, causal=True)
            x = x + gate2 * self._feed(block, shift2 + scale2 * self._norm(f"{block}.ln_2", x))
        return self._linear(f"{INNER}.action_pred", self._norm(f"{INNER}.decoder.ln", x))

    def _count(self, prefix: str) -> int:
        return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in self.w if name.startswith(f"{prefix}.")})

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        return self._linear(f"{name}.2", F.gelu(self._linear(f"{name}.0", x)))

    def _feed(self, block: str, x: Tensor) -> Tensor:
        return self._linear(f"{block}.mlp.c_proj", F.gelu(self._linear(f"{block}.mlp.c_fc", x)))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _attention(self, name: str, x: Tensor, y: Tensor, *, causal: bool = False) -> Tensor:
        q, k, v = self._linear(f"{name}.query", x), self._linear(f"{name}.key", y), self._linear(f"{name}.value", y)
        return self._linear(f"{name}.c_proj", self._attend(q, k, v, self.heads[2], causal=causal))

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False) -> Tensor:
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(0, 1) for y in (q, k, v))
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:  # counted from the left on both sides, however long the context
            logits = logits + torch.full(logits.shape[1:], float("-inf")).triu(1)
        return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
