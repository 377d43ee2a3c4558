"""The UNet of Stable Video Diffusion: loading, building, and features of a truncated forward pass (Sec. 3.1, A.3).

B batch, F frames, h x w latent, T text tokens, L tokens of the feature grid, C channels of all feature blocks together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError
from common.frozen import resolve_weights_path

# unet/config.json as published with stabilityai/stable-video-diffusion-img2vid: 1,524,623,082 parameters
SVD_UNET: dict[str, Any] = {
    "sample_size": 96,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "transformer_layers_per_block": 1,
    "num_attention_heads": [5, 10, 20, 20],
    "num_frames": 25,
}


def load(svd: str | Path, changes: Mapping[str, Any] | None = None) -> UNetSpatioTemporalConditionModel:
    """The UNet of a diffusers SVD pipeline folder or hub id, in fp32 and trainable.

    With `changes` to its config, an untrained UNet of the changed config. Raises common.frozen.MissingWeights where
    there is no such folder, UserError where the weights do not fit the config.
    """
    path = resolve_weights_path(svd, "Stable Video Diffusion")
    if changes:
        return build({**UNetSpatioTemporalConditionModel.load_config(path, subfolder="unet"), **changes})
    unet, keys = UNetSpatioTemporalConditionModel.from_pretrained(
        path, subfolder="unet", torch_dtype=torch.float32, output_loading_info=True
    )
    missing, unexpected = sorted(keys["missing_keys"]), sorted(keys["unexpected_keys"])
    if missing or unexpected:  # diffusers only warns, and initialises the missing weights at random
        raise UserError(
            f"{path}/unet: the weights do not fit config.json (missing {missing[:10]}, unexpected {unexpected[:10]}); "
            "download or save this folder again"
        )
    return unet


def build(
    config: Mapping[str, Any] | None = None, *, device: str | torch.device = "cpu"
) -> UNetSpatioTemporalConditionModel:
    """An untrained UNet from a config, SVD's by default. On `device="meta"` it takes no memory."""
    with torch.device(device):
        return UNetSpatioTemporalConditionModel.from_config(dict(config or SVD_UNET))


class _SkippedBlocks(nn.Module):
    """Replaces all up blocks after the last feature block. It has no resnets, so it takes no skip connections."""

    resnets = ()

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class _FeatureBlock(nn.Module):
    """An up block that keeps its last output, until FeatureUNet reads it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.resnets, self.output = block, block.resnets, None
        self.has_cross_attention = getattr(block, "has_cross_attention", False)

    def forward(self, hidden_states: Tensor, **conditions: Any) -> Tensor:
        self.output = self.block(hidden_states=hidden_states, **conditions)
        return self.output


class FeatureUNet(nn.Module):
    """The modules of `unet` in a pass that stops after the last feature block and returns the feature blocks' outputs.

    The forward of diffusers runs unchanged on it, so that the outputs equal those of the full pass bit for bit in every
    version of diffusers.
    """

    def __init__(self, unet: UNetSpatioTemporalConditionModel, up_block_indices: Sequence[int]) -> None:
        super().__init__()
        self.unet = copy.copy(unet)
        self.unet._modules = dict(unet._modules)
        blocks: list[nn.Module] = [
            _FeatureBlock(block) if index in up_block_indices else block
            for index, block in enumerate(unet.up_blocks[: max(up_block_indices) + 1])
        ]
        self.feature_blocks = [blocks[index] for index in up_block_indices]
        if len(blocks) < len(unet.up_blocks):
            blocks.append(_SkippedBlocks())
        self.unet.up_blocks = nn.ModuleList(blocks)
        self.unet.conv_norm_out = self.unet.conv_act = self.unet.conv_out = nn.Identity()

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, time_ids: Tensor) -> list[Tensor]:
        """Inputs as of `features` -> one (B * F, channels, height, width) for each of `up_block_indices`."""
        self.unet(sample, timestep, encoder_hidden_states=text, added_time_ids=time_ids)
        outputs = [block.output for block in self.feature_blocks]
        for block in self.feature_blocks:
            block.output = None
        return outputs


def features(
    unet: UNetSpatioTemporalConditionModel,
    sample: Tensor,
    timestep: Tensor,
    *,
    text: Tensor,
    time_ids: Tensor,
    up_block_indices: Sequence[int] = (0, 1),
    feature_unet: Callable[..., list[Tensor]] | None = None,
) -> Tensor:
    """The outputs of some up blocks, upsampled to the finest of their grids and concatenated on channels.

    sample (B, F, in_channels, h, w), timestep (B,), text (B, T, cross_attention_dim), time_ids (B, 3) -> (B, F, L, C).
    feature_unet: FeatureUNet(unet, up_block_indices), if the caller has one, for instance a compiled one.
    """
    if feature_unet is None:
        feature_unet = FeatureUNet(unet, up_block_indices)
    outputs = feature_unet(sample, timestep, text, time_ids)  # each (B * F, channels, height, width)
    grid = max((output.shape[-2:] for output in outputs), key=lambda size: size[0] * size[1])
    # VPP doubles coarse grids by nearest neighbour; for powers of two this is the same
    upsampled = [x if x.shape[-2:] == grid else F.interpolate(x, size=grid, mode="nearest") for x in outputs]
    return rearrange(torch.cat(upsampled, dim=1), "(b f) c h w -> b f (h w) c", f=sample.shape[1])  # (B, F, L, C)


def feature_shape(
    unet: UNetSpatioTemporalConditionModel, up_block_indices: Sequence[int], latent_size: int
) -> tuple[int, int]:
    """(L, C) of what `features` returns for square latents: every up block but the last doubles its grid.

    Raises UserError for blocks that this UNet does not have.
    """
    channels = list(reversed(unet.config.block_out_channels))
    if not up_block_indices or not all(0 <= index < len(channels) for index in up_block_indices):
        raise UserError(
            f"up_block_indices={list(up_block_indices)}: give one or more of the up blocks 0 to {len(channels) - 1}"
        )
    sides = [latent_size]
    for _ in channels[1:]:
        sides.append((sides[-1] + 1) // 2)
    side = sides[max(len(channels) - 2 - max(up_block_indices), 0)]
    return side * side, sum(channels[index] for index in up_block_indices)
