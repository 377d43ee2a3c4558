"""GFDM: imagine the next frames from one image and a sentence (Sec. 3.1, A.3, Tables 6 and 10).

B batch, F frames, H x W image, c x h x w latent (SVD: 4 x 32 x 32), T text tokens, L tokens of the feature grid,
C channels of the feature blocks.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from huggingface_hub import snapshot_download
from torch import Tensor

from common import frozen
from common.attention import sincos_pos_embed_1d
from common.contracts import TrainableModel, VideoBatch
from common.errors import UserError
from step1_gfdm import unet as svd_unet
from step1_gfdm import vae as svd_vae
from step1_gfdm.objective import Net, Objective

# What an SVD pipeline folder holds besides the UNet. This model never uses the image encoder and the feature extractor,
# but with them diffusers' StableVideoDiffusionPipeline opens an artifact of ours.
PIPELINE = ("vae", "scheduler", "image_encoder", "feature_extractor", "model_index.json")

# Temporal attention has one row for every pixel of every latent, and SDPA maps the rows to an axis of CUDA's grid that
# has this many places (pytorch#146704). At 256 x 256 pixels, 64 images (a batch of 32 with two views) are one row more.
MAX_ROWS = 65_535


class GFDM(TrainableModel):
    """Stable Video Diffusion conditioned on a sentence and, by concatenation on channels, on the first frame's latent.

    svd: diffusers SVD pipeline folder or hub id (the original SVD, VPP's checkpoints, artifacts of ours).
    clip: CLIP text encoder.
    up_block_indices: the up blocks of the UNet whose outputs are the features.
    text_tokens, text_positions: length of the sentence, and whether a position embedding is added to it.
    text_dropout: probability that a sample is trained without its sentence.
    unscaled_condition: divide the first frame's latent by the VAE's scale, as SVD and VPP do.
    fps, motion_bucket_id, noise_aug_strength: SVD's additional conditions, equal for all samples.
    schedule_steps, denoise_steps: `imagine` runs `denoise_steps` steps of a schedule of `schedule_steps` (Table 6).
    unet: changes to the UNet's config; the UNet is then untrained.

    All of these are stored with the weights, so that training and use agree.
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
        self.vae = svd_vae.load(svd)
        self.text = frozen.clip_text(clip, max_length=text_tokens)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.image_size, self.num_frames, self.up_block_indices = image_size, num_frames, tuple(up_block_indices)
        self.latent_size = image_size // self.vae.downsample_factor
        self.num_tokens, self.feature_dim = svd_unet.feature_shape(self.unet, self.up_block_indices, self.latent_size)
        self.text_dropout, self.unscaled_condition = text_dropout, unscaled_condition
        self.schedule_steps, self.denoise_steps = schedule_steps, denoise_steps
        self._text_repeats, remainder = divmod(self.unet.config.cross_attention_dim, self.text.dim)
        if remainder:
            raise UserError(
                f"{svd}: its UNet reads text of width {self.unet.config.cross_attention_dim}, which is not a multiple "
                f"of the {self.text.dim} of {clip}; choose another text encoder with gfdm.clip="
            )
        time_ids = torch.tensor([[fps, motion_bucket_id, noise_aug_strength]], dtype=torch.float32)
        self.register_buffer("_time_ids", time_ids, persistent=False)  # (1, 3)
        pos_embed = sincos_pos_embed_1d(text_tokens, self.text.dim) if text_positions else torch.zeros(1, self.text.dim)
        self.register_buffer("_text_pos_embed", pos_embed, persistent=False)  # (T or 1, CLIP's width)
        self._noise: dict[tuple[int, torch.device], Tensor] = {}
        self.__dict__["_feature_unet"] = None  # see compile_unet

    def forward(self, batch: VideoBatch) -> dict[str, Tensor]:
        """Scaled latents (B, F, c, h, w) and B sentences -> {"loss": ()}. Raises UserError for another F."""
        latents = batch["latents"]
        if latents.shape[1] != self.num_frames:
            raise UserError(
                f"the clips have {latents.shape[1]} frames, this model has {self.num_frames}; set data.num_frames to "
                f"{self.num_frames} ({batch['id'][:3]})"
            )
        text = self.encode_text(batch["text"])  # (B, T, cross_attention_dim)
        if self.training and self.text_dropout:
            # VPP drops the text, never the image, of 5 % of the samples; the paper does not say
            kept = torch.rand(len(text), 1, 1, device=text.device) >= self.text_dropout  # (B, 1, 1)
            text = text * kept.to(text.dtype)
        return {"loss": self.objective.training_loss(self._net(latents[:, 0], text), latents)}

    def imagine(self, image: Tensor, text: list[str], *, seed: int = 0) -> Tensor:
        """The features of the present and the next frames, without decoding them to images.

        (B, 3, H, W) in [-1, 1], B sentences -> (B, F, L, C). Several views are stacked on the batch axis. Every item
        starts from the same noise, which depends on `seed` only, so that a result does not depend on its batch. A batch
        that is too large for one pass of the UNet is divided into several of nearly equal size.
        """
        trains = any(p.requires_grad for p in self.unet.parameters())
        with nullcontext() if trains else torch.no_grad():
            first, tokens = self.encode_image(image), self.encode_text(text)  # (B, c, h, w), (B, T, width)
            passes = math.ceil(len(first) / max(1, MAX_ROWS // self.latent_size**2))
            if passes > 1:
                chunks = zip(first.chunk(passes), tokens.chunk(passes))
                return torch.cat([self._features(*chunk, seed) for chunk in chunks])  # (B, F, L, C)
            return self._features(first, tokens, seed)  # (B, F, L, C)

    def compile_unet(self, **options: Any) -> None:
        """Compile the truncated pass of the UNet that `imagine` runs; `options` are those of torch.compile."""
        feature_unet = svd_unet.FeatureUNet(self.unet, self.up_block_indices)
        feature_unet.compile(**options)
        # it shares the UNet's parameters: as a registered submodule it would add them to the state dict a second time
        self.__dict__["_feature_unet"] = feature_unet

    def freeze_unused_blocks(self) -> None:
        """Freeze the blocks after the last feature block. `imagine` never runs them, and DDP would wait for them."""
        unused = self.unet.up_blocks[max(self.up_block_indices) + 1 :]
        for module in (*unused, self.unet.conv_norm_out, self.unet.conv_out):
            module.requires_grad_(False)

    @torch.no_grad()
    def generate(
        self, image: Tensor, text: list[str], *, steps: int = 20, guidance_scale: float = 1.0, seed: int = 0
    ) -> Tensor:
        """(B, 3, H, W) in [-1, 1], B sentences -> video (B, F, 3, H, W) in [0, 1], whose frame 0 is the present.

        The guidance scale rises linearly from 1 at frame 0 to `guidance_scale` at the last frame, as in SVD and VPP;
        `guidance_scale=1` turns guidance off.
        """
        first, tokens = self.encode_image(image), self.encode_text(text)  # (B, c, h, w), (B, T, width)
        net = self._net(first, tokens) if guidance_scale == 1.0 else self._guided_net(first, tokens, guidance_scale)
        latents = self.objective.sample(net, self._start_noise(len(first), seed), steps=steps)  # (B, F, c, h, w)
        return self.vae.decode(latents)  # (B, F, 3, H, W)

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, c, h, w): the scaled mode of the posterior. UserError for other sizes."""
        expected = (3, self.image_size, self.image_size)
        if image.shape[1:] != expected:
            raise UserError(
                f"the images have the shape {tuple(image.shape[1:])}, this GFDM needs {expected}; resize them"
            )
        return self.vae.encode(image)

    def encode_text(self, text: list[str]) -> Tensor:
        """B sentences -> (B, T, cross_attention_dim): CLIP's last hidden states, repeated to the UNet's width."""
        tokens = self.text(text).to(self._time_ids.device) + self._text_pos_embed  # (B, T, CLIP's width)
        # VPP concatenates CLIP's 512 channels with themselves for the 1024 of SVD; there is no learned projection
        return tokens.repeat(1, 1, self._text_repeats).to(self.unet.dtype)

    def save_weights(self, folder: Path) -> None:
        """Write a diffusers pipeline folder: the trained UNet, and the other parts as this model loaded them."""
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
        """Read the UNet of a pipeline folder, unless this model was built from that very folder.

        Raises UserError where its weights do not fit this model.
        """
        if not self._untrained and Path(self.svd) == Path(folder):
            return
        try:
            self.unet.load_state_dict(svd_unet.load(folder).state_dict())
        except RuntimeError as error:
            raise UserError(f"{folder}/unet does not fit this model's config.yaml: {error}") from error

    def _features(self, first: Tensor, text: Tensor, seed: int) -> Tensor:
        """First-frame latents (B, c, h, w), text (B, T, cross_attention_dim) -> (B, F, L, C), in one pass."""
        x, timestep = self.objective.network_input_after(
            self._net(first, text),
            self._start_noise(len(first), seed),
            schedule_steps=self.schedule_steps,
            num_steps=self.denoise_steps - 1,
        )  # (B, F, c, h, w), (B,)
        return svd_unet.features(
            self.unet,
            self._concat_condition(x, first),
            timestep,
            text=text,
            time_ids=self._time_ids.expand(len(first), -1),
            up_block_indices=self.up_block_indices,
            feature_unet=self._feature_unet,
        )

    def _net(self, first: Tensor, text: Tensor) -> Net:
        """The UNet with its conditions bound."""

        def net(x: Tensor, timestep: Tensor) -> Tensor:
            return self.unet(
                self._concat_condition(x, first),
                timestep,
                encoder_hidden_states=text,
                added_time_ids=self._time_ids.expand(len(x), -1),
                return_dict=False,
            )[0]

        return net

    def _guided_net(self, first: Tensor, text: Tensor, guidance_scale: float) -> Net:
        """Classifier-free guidance for the text. The image stays a condition of both: training never drops it."""
        doubled = self._net(torch.cat([first, first]), torch.cat([text, torch.zeros_like(text)]))
        scales = torch.linspace(1.0, guidance_scale, self.num_frames, device=first.device)
        scales = rearrange(scales, "f -> 1 f 1 1 1")

        def net(x: Tensor, timestep: Tensor) -> Tensor:
            cond, uncond = doubled(torch.cat([x, x]), torch.cat([timestep, timestep])).chunk(2)
            return uncond + scales * (cond - uncond)

        return net

    def _concat_condition(self, x: Tensor, first: Tensor) -> Tensor:
        """Noisy latents (B, F, c, h, w), first-frame latent (B, c, h, w) -> (B, F, 2c, h, w) in the UNet's dtype."""
        condition = first / self.vae.scale if self.unscaled_condition else first
        condition = repeat(condition, "b c h w -> b f c h w", f=x.shape[1]).to(x.dtype)
        return torch.cat([x, condition], dim=2).to(self.unet.dtype)

    def _start_noise(self, count: int, seed: int) -> Tensor:
        """(count, F, c, h, w): one noise video, repeated. It is drawn on the CPU, so it is the same on every device."""
        key = (seed, self._time_ids.device)
        if key not in self._noise:
            shape = (1, self.num_frames, self.vae.channels, self.latent_size, self.latent_size)
            self._noise = {key: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(key[1])}
        return self._noise[key].expand(count, -1, -1, -1, -1)
