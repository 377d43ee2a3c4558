"""SVD's UNet: loading, building on any device, and features of a forward pass that stops early (Sec. 3.1, A.3).

B batch, F frames, L tokens of the tapped grid, C channels of all taps together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

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
    """The UNet of a diffusers SVD pipeline folder or hub id, in fp32 and trainable, keys strict.

    With `changes` to its config it is built anew and untrained.
    """
    path = resolve_weights_path(svd, "Stable Video Diffusion")
    if changes:
        return build({**UNetSpatioTemporalConditionModel.load_config(path, subfolder="unet"), **changes})
    unet, keys = UNetSpatioTemporalConditionModel.from_pretrained(
        path, subfolder="unet", torch_dtype=torch.float32, output_loading_info=True
    )
    missing, unexpected = sorted(keys["missing_keys"]), sorted(keys["unexpected_keys"])
    if missing or unexpected:  # diffusers only warns, and starts what is missing at random
        raise ValueError(f"{path}/unet does not fit its config: missing {missing[:10]}, unexpected {unexpected[:10]}")
    return unet


def build(
    config: Mapping[str, Any] | None = None, *, device: str | torch.device = "cpu"
) -> UNetSpatioTemporalConditionModel:
    """An untrained UNet from a config (SVD's by default); `device="meta"` costs no memory."""
    with torch.device(device):
        return UNetSpatioTemporalConditionModel.from_config(dict(config or SVD_UNET))


class _Stop(nn.Module):
    """Stands where the first uncomputed up block stood; no resnets, so it takes no skip connections."""

    resnets = ()

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class _Tap(nn.Module):
    """Stands where a tapped up block stood and keeps what it gives."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.resnets, self.output = block, block.resnets, None
        self.has_cross_attention = getattr(block, "has_cross_attention", False)

    def forward(self, hidden_states: Tensor, **conditions: Any) -> Tensor:
        self.output = self.block(hidden_states=hidden_states, **conditions)
        return self.output


class FeatureUNet(nn.Module):
    """A view of `unet`, sharing its modules, whose forward ends after the last tapped up block and gives what the
    tapped ones gave.

    diffusers' own forward runs unchanged, so the outputs are the full pass's bit for bit in every diffusers version.
    """

    def __init__(self, unet: UNetSpatioTemporalConditionModel, up_block_indices: Sequence[int]) -> None:
        super().__init__()
        self.unet = copy.copy(unet)
        self.unet._modules = dict(unet._modules)
        kept: list[nn.Module] = [
            _Tap(block) if index in up_block_indices else block
            for index, block in enumerate(unet.up_blocks[: max(up_block_indices) + 1])
        ]
        self.tapped = [kept[tap] for tap in up_block_indices]
        self.unet.up_blocks = nn.ModuleList(kept if len(kept) == len(unet.up_blocks) else [*kept, _Stop()])
        self.unet.conv_norm_out = self.unet.conv_act = self.unet.conv_out = nn.Identity()

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, time_ids: Tensor) -> list[Tensor]:
        """As `features`; one (B * F, c, h, w) for each tap."""
        self.unet(sample, timestep, encoder_hidden_states=text, added_time_ids=time_ids)
        outputs = [block.output for block in self.tapped]
        for block in self.tapped:
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
    tapped: Callable[..., list[Tensor]] | None = None,
) -> Tensor:
    """Outputs of the tapped up blocks, coarse grids repeated to the finest one, joined on channels.

    sample (B, F, in_channels, h, w), timestep (B,), text (B, T, cross_attention_dim), time_ids (B, 3) -> (B, F, L, C).
    tapped: FeatureUNet(unet, taps) if it is at hand, compiled for instance.
    """
    outputs = (FeatureUNet(unet, up_block_indices) if tapped is None else tapped)(sample, timestep, text, time_ids)
    grid = max((output.shape[-2:] for output in outputs), key=lambda size: size[0] * size[1])
    # VPP doubles coarse grids by nearest neighbour; with powers of two this is the same
    joined = torch.cat(
        [o if o.shape[-2:] == grid else F.interpolate(o, size=grid, mode="nearest") for o in outputs], dim=1
    )
    return joined.flatten(2).transpose(1, 2).unflatten(0, sample.shape[:2])


def feature_shape(
    unet: UNetSpatioTemporalConditionModel, up_block_indices: Sequence[int], latent_size: int
) -> tuple[int, int]:
    """(L, C) that `features` gives for square latents: every up block but the last goes one grid finer."""
    channels = list(reversed(unet.config.block_out_channels))
    if not up_block_indices or not all(0 <= tap < len(channels) for tap in up_block_indices):
        raise ValueError(f"taps name up blocks 0 to {len(channels) - 1}, not {list(up_block_indices)}")
    sides = [latent_size]
    for _ in channels[1:]:
        sides.append((sides[-1] + 1) // 2)
    side = sides[max(len(channels) - 2 - max(up_block_indices), 0)]
    return side * side, sum(channels[tap] for tap in up_block_indices)
