"""The frozen temporal VAE of Stable Video Diffusion, between images and scaled latents (Sec. 3.1, z = E(o)).

B batch, F frames, N images, c x h x w latent of one image, H x W image.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor

from common.frozen import FrozenModule, resolve_weights_path
from common.image_range import denormalize


class FrozenVAE(FrozenModule):
    """The frozen VAE. The latents that it returns are multiplied by `scale`, and `decode` expects such latents.

    scale: the scaling factor of the VAE's config. downsample_factor: H / h = W / w. channels: c.
    """

    def __init__(self, vae: AutoencoderKLTemporalDecoder) -> None:
        super().__init__(vae)
        # on a CPU this makes the encoder a fifth faster in bf16 and a third faster in fp32
        vae.encoder.to(memory_format=torch.channels_last)
        self.scale: float = vae.config.scaling_factor
        self.downsample_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels: int = vae.config.latent_channels

    @torch.no_grad()
    def moments(self, images: Tensor, *, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, in fp32.

        (N, 3, H, W) in [-1, 1] -> two of (N, c, h, w). The VAE sees `chunk_size` images at a time.
        """
        posteriors = [
            self.module.encode(chunk.to(self.device, self.dtype)).latent_dist for chunk in images.split(chunk_size)
        ]
        mean = torch.cat([posterior.mean for posterior in posteriors]).float() * self.scale
        std = torch.cat([posterior.std for posterior in posteriors]).float() * self.scale
        return mean, std

    def encode(
        self,
        images: Tensor,
        *,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
        chunk_size: int = 64,
    ) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, c, h, w) in fp32: the mode of the posterior, or a sample from it."""
        mean, std = self.moments(images, chunk_size=chunk_size)
        return sample_gaussian(mean, std, generator) if sample_posterior else mean

    @torch.no_grad()
    def decode(self, latents: Tensor, *, chunk_size: int = 7) -> Tensor:
        """(B, F, c, h, w) -> (B, F, 3, H, W) in [0, 1], decoded `chunk_size` frames at a time (VPP: 7)."""
        videos = []
        for video in (latents / self.scale).to(self.device, self.dtype):  # (F, c, h, w)
            chunks = [self.module.decode(chunk, num_frames=len(chunk)).sample for chunk in video.split(chunk_size)]
            videos.append(torch.cat(chunks))  # (F, 3, H, W) in [-1, 1]
        return denormalize(torch.stack(videos).float()).clamp(0, 1)


def sample_gaussian(mean: Tensor, std: Tensor, generator: torch.Generator | None) -> Tensor:
    """A sample of N(mean, std^2), of their shape. The noise is drawn on the CPU, so every machine draws the same."""
    return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)


def load(svd: str | Path) -> FrozenVAE:
    """The VAE of a diffusers SVD pipeline folder or hub id. Raises common.frozen.MissingWeights."""
    path = resolve_weights_path(svd, "Stable Video Diffusion")
    return FrozenVAE(AutoencoderKLTemporalDecoder.from_pretrained(path, subfolder="vae"))
