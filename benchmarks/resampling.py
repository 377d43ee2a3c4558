"""How much DINOv2's tokens change because the policy resizes a picture twice, where step 2 resizes it once.

    python -m benchmarks.resampling <folder of videos> [<folder of timm's DINOv2>]

The policy resizes from the camera to its own size and from there to DINOv2's. Measured on two frames of every video,
squeezed to the sizes of CALVIN's cameras. Without the second folder, DINOv2 is a ViT-B/14 with random weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

from common.frozen import DinoV2, dinov2
from common.video import read_frames, resize

POLICY_SIZE, DINOV2_SIZE = 256, 224  # scale=full
CAMERAS = {"static": 200, "gripper": 84}


def pictures(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def main(folder: str, weights: str | None = None) -> None:
    torch.manual_seed(0)
    videos = map(read_frames, sorted(f for f in Path(folder).rglob("*") if f.suffix in (".mp4", ".webm")))
    frames = [video[[0, len(video) // 3]] for video in videos]
    random = (
        None
        if weights
        else timm.create_model("vit_base_patch14_reg4_dinov2", pretrained=False, num_classes=0, img_size=DINOV2_SIZE)
    )
    encoder = dinov2(weights, DINOV2_SIZE) if weights else DinoV2(random, DINOV2_SIZE)
    for camera, side in CAMERAS.items():
        seen = np.concatenate([pictures(resize(pair, side)) for pair in frames])
        once = resize(seen, DINOV2_SIZE)
        twice = torch.nn.functional.interpolate(
            resize(seen, POLICY_SIZE), (DINOV2_SIZE, DINOV2_SIZE), mode="bilinear", antialias=True, align_corners=False
        )
        psnr = -10 * (once - twice).square().mean((1, 2, 3)).log10()
        tokens, off = encoder(once), encoder(twice)
        error = (tokens - off).square().mean()
        print(
            f"{camera} ({side} px), {len(seen)} pictures: PSNR {psnr.median():.1f} dB (least {psnr.min():.1f}); "
            "squared error of the tokens "
            f"{100 * error / tokens.var((0, 1)).mean():.2f} % of their variance, "
            f"{100 * error / (tokens[::2] - tokens[1::2]).square().mean():.2f} % of what differs between two frames of "
            "a video"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
