"""GFDM: imagine what happens next from one picture and a sentence (Sec. 3.1, A.3, Tables 6 and 10).

B batch, F frames, L tokens of the tapped grid, C channels of the tapped blocks, T text tokens, c x h x w latent (SVD: 4
x 32 x 32).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from common import frozen
from common.attention import sincos_pos_embed_1d
from common.contracts import VideoBatch
from step1_gfdm import unet as svd_unet
from step1_gfdm import vae as svd_vae
from step1_gfdm.objective import Net, Objective

# what an SVD pipeline folder holds beside the UNet; the image encoder is never used but lets SVD's own pipeline open
# ours
PIPELINE = ("vae", "scheduler", "image_encoder", "feature_extractor", "model_index.json")

# Temporal attention has a row for every pixel of every latent, and SDPA puts rows on an axis of CUDA's grid that ends
# here (pytorch#146704):
# at 256 x 256, 64 pictures (a batch of 32 with two views) are one row too many
MAX_ROWS = 65_535


class GFDM(nn.Module):
    """Stable Video Diffusion told by text what to do; the first frame's latent is joined on channels.

    svd: diffusers SVD pipeline folder or hub id (original SVD, VPP's checkpoints, our artifacts); clip: CLIP text
    encoder.
    The fields from `text_tokens` on decide what the UNet sees; they are stored with the weights, so that training and
    use agree.
    `denoise_steps` steps of a `schedule_steps` schedule are taken by `imagine` (Table 6 varies the first). `unet`
    changes entries
    of the UNet's config and starts it untrained.
    """

    def __init__(
        self,
        svd: str,
        clip: str,
        *,
        objective: Objective,
        image_size: int = 256,
        num_frames: int = 16,
        up_block_indices: Sequence[int] = (0, 1),
        text_tokens: int = 20,
        text_positions: bool = False,
        text_dropout: float = 0.05,
        unscaled_condition: bool = True,
        fps: float = 7,
        motion_bucket_id: float = 127,
        noise_aug_strength: float = 0.0,
        schedule_steps: int = 20,
        denoise_steps: int = 1,
        gradient_checkpointing: bool = False,
        unet: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.svd, self.objective, self._untrained = svd, objective, bool(unet)
        self.unet = svd_unet.load(svd, unet)
        self.latent_space = svd_vae.load(svd)
        self.text = frozen.clip_text(clip, max_length=text_tokens)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.image_size, self.num_frames, self.up_block_indices = image_size, num_frames, tuple(up_block_indices)
        self.latent_size = image_size // self.latent_space.factor
        self.num_tokens, self.feature_dim = svd_unet.feature_shape(self.unet, self.up_block_indices, self.latent_size)
        self.text_dropout, self.unscaled_condition = text_dropout, unscaled_condition
        self.schedule_steps, self.denoise_steps = schedule_steps, denoise_steps
        width = self.unet.config.cross_attention_dim
        if width % self.text.dim:
            raise ValueError(
                f"{svd}: the UNet reads text of width {width}, which is no multiple of CLIP's {self.text.dim}"
            )
        self._copies = width // self.text.dim
        self.register_buffer(
            "_time_ids",
            torch.tensor([[fps, motion_bucket_id, noise_aug_strength]], dtype=torch.float32),
            persistent=False,
        )
        positions = sincos_pos_embed_1d(text_tokens, self.text.dim) if text_positions else torch.zeros(1, self.text.dim)
        self.register_buffer("_text_positions", positions, persistent=False)
        self._noise: dict[tuple[int, torch.device], Tensor] = {}
        self.__dict__["_tapped"] = None

    def forward(self, batch: VideoBatch) -> dict[str, Tensor]:
        """Latents (B, F, c, h, w), times the VAE's scale, and B sentences -> the training loss."""
        latents = batch["latents"]
        if latents.shape[1] != self.num_frames:
            raise ValueError(f"clips of {latents.shape[1]} frames for a model of {self.num_frames}: {batch['id'][:3]}")
        text = self.encode_text(batch["text"])
        if self.training and self.text_dropout:
            # VPP drops text, never the picture, in 5 % of the samples; the paper is silent
            kept = torch.rand(len(text), 1, 1, device=text.device) >= self.text_dropout
            text = text * kept.to(text.dtype)
        return {"loss": self.objective.training_loss(self._net(latents[:, 0], text), latents)}

    def imagine(self, image: Tensor, text: list[str], *, seed: int = 0) -> Tensor:
        """(B, 3, H, W) in [-1, 1], B strings -> (B, F, L, C): features of the next frames, no decoding.

        Every item starts from the same noise of `seed`, whatever the batch; several views go on the batch axis. More
        than one pass of
        the UNet may hold are shared out evenly over several.
        """
        trains = any(p.requires_grad for p in self.unet.parameters())
        with nullcontext() if trains else torch.no_grad():
            first, tokens = self.encode_image(image), self.encode_text(text)
            passes = math.ceil(len(first) / max(1, MAX_ROWS // self.latent_size**2))
            if passes > 1:
                return torch.cat(
                    [self._features(*part, seed) for part in zip(first.chunk(passes), tokens.chunk(passes))]
                )
            return self._features(first, tokens, seed)

    def compile_unet(self, **options: Any) -> None:
        """Have torch.compile make the pass that `imagine` reads its features from; options are its own."""
        tapped = svd_unet.FeatureUNet(self.unet, self.up_block_indices)
        tapped.compile(**options)
        self.__dict__["_tapped"] = tapped  # past torch's registry, where the UNet's weights would count twice

    def freeze_unused_blocks(self) -> None:
        """For training through `imagine`: blocks behind the last tap never run, and DDP must not wait for their
        gradients."""
        for module in (
            *self.unet.up_blocks[max(self.up_block_indices) + 1 :],
            self.unet.conv_norm_out,
            self.unet.conv_out,
        ):
            module.requires_grad_(False)

    @torch.no_grad()
    def generate(
        self, image: Tensor, text: list[str], *, steps: int = 20, guidance_scale: float = 1.0, seed: int = 0
    ) -> Tensor:
        """(B, 3, H, W) in [-1, 1], B strings -> video (B, F, 3, H, W) in [0, 1], frame 0 being the present.

        Guidance rises linearly from 1 at frame 0 to `guidance_scale` at the last frame, as SVD and VPP do; 1 turns it off.
        """
        first, tokens = self.encode_image(image), self.encode_text(text)
        net = self._net(first, tokens) if guidance_scale == 1.0 else self._guided(first, tokens, guidance_scale)
        return self.latent_space.decode(self.objective.sample(net, self._start_noise(len(first), seed), steps=steps))

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, c, h, w): the mode of the VAE's distribution, times its scale."""
        if image.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pictures of shape {tuple(image.shape[1:])}; this GFDM sees (3, {self.image_size}, {self.image_size})"
            )
        return self.latent_space.encode(image)

    def encode_text(self, text: list[str]) -> Tensor:
        """B strings -> (B, T, cross_attention_dim): CLIP's last hidden states, repeated to the UNet's width."""
        tokens = self.text(text).to(self._time_ids.device) + self._text_positions
        # VPP joins the 512 channels with themselves for SVD's 1024; no learned projection
        return tokens.repeat(1, 1, self._copies).to(self.unet.dtype)

    def save_weights(self, folder: Path) -> None:
        """Write a diffusers pipeline folder: the UNet, and the other parts as they came."""
        source = Path(self.svd)
        if not source.is_dir():
            source = Path(snapshot_download(self.svd, allow_patterns=[f"{part}*" for part in PIPELINE]))
        self.unet.save_pretrained(folder / "unet")
        for part in PIPELINE:
            if (source / part).is_dir():
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
            elif (source / part).is_file():
                shutil.copy(source / part, folder / part)

    def load_weights(self, folder: Path) -> None:
        """Read the UNet of a pipeline folder, keys strict; nothing to do where it was built from that very folder."""
        if self._untrained or Path(self.svd) != Path(folder):
            self.unet.load_state_dict(svd_unet.load(folder).state_dict())

    def _features(self, first: Tensor, tokens: Tensor, seed: int) -> Tensor:
        noise = self._start_noise(len(first), seed)
        x, timestep = self.objective.network_input_after(
            self._net(first, tokens), noise, schedule_steps=self.schedule_steps, num_steps=self.denoise_steps - 1
        )
        return svd_unet.features(
            self.unet,
            self._with_condition(x, first),
            timestep,
            text=tokens,
            time_ids=self._ids(len(first)),
            up_block_indices=self.up_block_indices,
            tapped=self._tapped,
        )

    def _net(self, first: Tensor, text: Tensor) -> Net:
        """The UNet with its conditions filled in."""

        def net(x: Tensor, timestep: Tensor) -> Tensor:
            return self.unet(
                self._with_condition(x, first),
                timestep,
                encoder_hidden_states=text,
                added_time_ids=self._ids(len(x)),
                return_dict=False,
            )[0]

        return net

    def _guided(self, first: Tensor, text: Tensor, guidance_scale: float) -> Net:
        """Away from what the UNet does without text. The picture stays: training never dropped it."""
        both = self._net(first.repeat(2, 1, 1, 1), torch.cat([text, torch.zeros_like(text)]))
        frame_scales = torch.linspace(1.0, guidance_scale, self.num_frames, device=first.device).view(1, -1, 1, 1, 1)

        def net(x: Tensor, timestep: Tensor) -> Tensor:
            cond, uncond = both(x.repeat(2, 1, 1, 1, 1), timestep.repeat(2)).chunk(2)
            return uncond + frame_scales * (cond - uncond)

        return net

    def _with_condition(self, x: Tensor, first: Tensor) -> Tensor:
        """Noisy latents (B, F, c, h, w) ++ first-frame latent (B, c, h, w) on channels, in the UNet's precision."""
        condition = first / self.latent_space.scale if self.unscaled_condition else first
        return torch.cat([x, condition[:, None].expand(-1, x.shape[1], -1, -1, -1).to(x.dtype)], dim=2).to(
            self.unet.dtype
        )

    def _ids(self, count: int) -> Tensor:
        return self._time_ids.expand(count, -1)

    def _start_noise(self, count: int, seed: int) -> Tensor:
        """One noise video a seed, drawn on the CPU so that every device starts from the same."""
        key = (seed, self._time_ids.device)
        if key not in self._noise:
            shape = (1, self.num_frames, self.latent_space.channels, self.latent_size, self.latent_size)
            self._noise = {key: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(key[1])}
        return self._noise[key].expand(count, -1, -1, -1, -1)
