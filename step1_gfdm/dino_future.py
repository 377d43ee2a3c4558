"""Another forward model: it predicts DINOv2's tokens of the next frames at once (Table 6, row "DINO").

The paper gives no more than the name. Ours is a regression in the token space that the inverse model reads, without
noise and without decoding to images.
B batch, F frames, N visual tokens of a frame, E their width, T text tokens, D width of the transformer.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from common.attention import Attention, Mlp, sincos_pos_embed_1d, sincos_pos_embed_2d
from common.contracts import FrameBatch, TrainableModel
from common.errors import UserError
from common.frozen import CLIPTextEncoder, DinoV2
from common.image_range import denormalize


class FutureBlock(nn.Module):
    """A pre-norm block: attention within each frame, along time at each token, to the sentence, then an MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_spatial, self.spatial = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm_temporal, self.temporal = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm_text, self.cross_attn = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, F, N, D), text (B, T, D) -> (B, F, N, D)."""
        axes = dict(zip(("b", "f", "n"), x.shape))
        y = self.spatial(rearrange(self.norm_spatial(x), "b f n d -> (b f) n d"))  # (B * F, N, D)
        x = x + rearrange(y, "(b f) n d -> b f n d", **axes)
        y = self.temporal(rearrange(self.norm_temporal(x), "b f n d -> (b n) f d"))  # (B * N, F, D)
        x = x + rearrange(y, "(b n) f d -> b f n d", **axes)
        y = self.cross_attn(rearrange(self.norm_text(x), "b f n d -> b (f n) d"), text)  # (B, F * N, D)
        x = x + rearrange(y, "b (f n) d -> b f n d", **axes)
        return x + self.mlp(self.norm_mlp(x))  # (B, F, N, D)


class DinoFuture(TrainableModel):
    """contracts.FutureDynamics in the space of DINOv2: the tokens of one frame and a sentence -> those of F frames.

    Frame 0 of the output is the present. The model predicts the change from the present, which is zero before
    training. The frozen encoders `vision` and `text` are not part of its weights.
    """

    def __init__(
        self,
        vision: DinoV2,
        text: CLIPTextEncoder,
        *,
        num_frames: int = 16,
        dim: int = 768,
        layers: int = 12,
        num_heads: int = 12,
    ) -> None:
        super().__init__()
        self.vision, self.text, self.num_frames = vision, text, num_frames
        self.feature_dim, self.num_tokens = vision.dim, vision.num_tokens
        self.stem, self.text_proj = nn.Linear(vision.dim, dim), nn.Linear(text.dim, dim)
        spatial, temporal = sincos_pos_embed_2d(*vision.grid, dim), sincos_pos_embed_1d(num_frames, dim)
        self.register_buffer("spatial_pos_embed", spatial, persistent=False)  # (N, D)
        self.register_buffer("temporal_pos_embed", rearrange(temporal, "f d -> f 1 d"), persistent=False)
        self.blocks = nn.ModuleList(FutureBlock(dim, num_heads) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, vision.dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, batch: FrameBatch) -> dict[str, Tensor]:
        """Frames (B, F, 3, H, W) in [0, 1] and B sentences -> "loss", "mse" and "copy_mse", each ().

        "copy_mse" is the error of repeating the present, the baseline of "mse". Raises UserError for another F.
        """
        frames = batch["frames"]
        if frames.shape[1] != self.num_frames:
            raise UserError(
                f"the clips have {frames.shape[1]} frames, this model has {self.num_frames}; set data.num_frames to "
                f"{self.num_frames} ({batch['id'][:3]})"
            )
        target = self.vision(rearrange(frames, "b f c h w -> (b f) c h w"))  # (B * F, N, E)
        target = rearrange(target, "(b f) n e -> b f n e", f=self.num_frames)
        prediction = self.predict(target[:, 0], batch["text"])  # (B, F, N, E)
        loss = (prediction[:, 1:].float() - target[:, 1:]).square().mean()
        copy_mse = (target[:, :1] - target[:, 1:]).square().mean()
        return {"loss": loss, "mse": loss.detach(), "copy_mse": copy_mse}

    def predict(self, now: Tensor, text: list[str]) -> Tensor:
        """The visual tokens (B, N, E) of the present and B sentences -> the tokens (B, F, N, E) of F frames."""
        x = self.stem(now) + self.spatial_pos_embed  # (B, N, D)
        x = rearrange(x, "b n d -> b 1 n d") + self.temporal_pos_embed  # (B, F, N, D)
        text_tokens = self.text_proj(self.text(text).to(x.device))  # (B, T, D)
        for block in self.blocks:
            x = block(x, text_tokens)  # (B, F, N, D)
        return rearrange(now, "b n e -> b 1 n e") + self.out(self.norm(x))  # (B, F, N, E)

    def imagine(self, image: Tensor, text: list[str], *, seed: int = 0) -> Tensor:
        """(B, 3, H, W) in [-1, 1], B sentences -> (B, F, N, E). The model is deterministic and ignores `seed`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return self.predict(self.vision(denormalize(image)), text)

    def compile_unet(self, **options: Any) -> None:
        """Nothing to compile: there is no UNet."""

    def freeze_unused_blocks(self) -> None:
        """Nothing to freeze: every part of the model contributes to `imagine`."""
