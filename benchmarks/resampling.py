"""How much DINOv2 sees of the policy's picture being resized twice, camera -> policy -> DINOv2, where step 2 resizes
once.

    python -m benchmarks.resampling <folder of videos> [<timm's DINOv2 folder>]

Two frames of every video, squeezed to CALVIN's cameras. Without a folder DINOv2 is ViT-B/14 with random weights.
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

POLICY, EYES = 256, 224  # policy_size/defi_full and gidm/full
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
        else timm.create_model("vit_base_patch14_reg4_dinov2", pretrained=False, num_classes=0, img_size=EYES)
    )
    eyes = dinov2(weights, EYES) if weights else DinoV2(random, EYES)
    for camera, side in CAMERAS.items():
        seen = np.concatenate([pictures(resize(pair, side)) for pair in frames])
        once = resize(seen, EYES)
        twice = torch.nn.functional.interpolate(
            resize(seen, POLICY), (EYES, EYES), mode="bilinear", antialias=True, align_corners=False
        )
        psnr = -10 * (once - twice).square().mean((1, 2, 3)).log10()
        tokens, off = eyes(once), eyes(twice)
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
