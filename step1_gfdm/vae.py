"""SVD's temporal VAE between pictures in [-1, 1] and scaled latents (Sec. 3.1, z = E(o)).

B batch, F frames, T frames of a whole video.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor

from common.frozen import FrozenModule, resolve_weights_path


class FrozenVAE(FrozenModule):
    """The frozen VAE. Latents leave it times `scale` and come back the same way."""

    def __init__(self, vae: AutoencoderKLTemporalDecoder) -> None:
        super().__init__(vae)
        vae.encoder.to(memory_format=torch.channels_last)  # a fifth faster in bf16 and a third in fp32, on a CPU
        self.scale: float = vae.config.scaling_factor
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels: int = vae.config.latent_channels

    @torch.no_grad()
    def moments(self, images: Tensor, *, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] -> mean and deviation of the latents, each (N, c, H/factor, W/factor) in fp32,
        scaled."""
        found = [self.module.encode(part.to(self.device, self.dtype)).latent_dist for part in images.split(chunk_size)]
        return tuple(
            torch.cat([getattr(each, name) for each in found]).float() * self.scale for name in ("mean", "std")
        )

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None, chunk_size: int = 64
    ) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, c, H/factor, W/factor) in fp32; the distribution's mode, or a sample of it."""
        mean, deviation = self.moments(images, chunk_size=chunk_size)
        return sample_gaussian(mean, deviation, generator) if sample else mean

    @torch.no_grad()
    def decode(self, latents: Tensor, *, chunk_size: int = 7) -> Tensor:
        """(B, F, c, h, w) -> (B, F, 3, H, W) in [0, 1], `chunk` frames at a time (VPP: 7)."""
        videos = []
        for video in (latents / self.scale).to(self.device, self.dtype):
            parts = [self.module.decode(part, num_frames=len(part)).sample for part in video.split(chunk_size)]
            videos.append(torch.cat(parts))
        return (torch.stack(videos).float() / 2 + 0.5).clamp(0, 1)


def sample_gaussian(mean: Tensor, deviation: Tensor, generator: torch.Generator | None) -> Tensor:
    """A sample of the distribution; its noise is drawn on the CPU, so that it is the same on every machine."""
    return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)


def load(svd: str | Path) -> FrozenVAE:
    """The VAE of a diffusers SVD pipeline folder or hub id."""
    return FrozenVAE(
        AutoencoderKLTemporalDecoder.from_pretrained(
            resolve_weights_path(svd, "Stable Video Diffusion"), subfolder="vae"
        )
    )
