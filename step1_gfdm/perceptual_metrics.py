"""Distances that need a trained eye: LPIPS between frames, a Fréchet distance between videos (Fig. 9; Unterthiner et
al., 2018).

The eye is named beside every number: weights differ, and numbers of different eyes do not compare.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from torchmetrics.image.fid import FrechetInceptionDistance

from common.frozen import DinoV2, dinov2


class MetricUnavailable(RuntimeError):
    """The weights of an eye are not on this machine; the message says which and where they come from."""


def lpips(net: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Frames (N, 3, H, W) twice, in [0, 1] -> (N,). net: alex, vgg or squeeze. Raises Missing."""

    def distance(prediction: Tensor, truth: Tensor) -> Tensor:
        return learned_perceptual_image_patch_similarity(
            prediction.float().clamp(0, 1), truth.float().clamp(0, 1), net_type=net, reduction="none", normalize=True
        ).reshape(-1)

    try:
        distance(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    except OSError as error:  # torchvision looks for its backbone in torch's hub folder, then on the net
        raise MetricUnavailable(
            f"LPIPS is left out: torchvision's {net} weights are not in {torch.hub.get_dir()} and cannot be fetched "
            f"({error})"
        ) from error
    return distance


class VideoFeatureExtractor:
    """A video as one vector: DINOv2's tokens averaged over each frame; their mean over time and the mean of their
    changes."""

    def __init__(self, path: str | Path, image_size: int, device: torch.device) -> None:
        try:
            self.vision: DinoV2 = dinov2(path, image_size).to(device)
        except FileNotFoundError as error:
            raise MetricUnavailable(f"the Fréchet distance is left out: {error}") from error
        self.name = f"DINOv2 from {path}"

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, F, 3, H, W) in [0, 1] -> (B, 2 E) on the CPU."""
        tokens = self.vision(videos.float().clamp(0, 1).flatten(0, 1)).mean(1).unflatten(0, videos.shape[:2])
        return torch.cat([tokens.mean(1), tokens.diff(dim=1).abs().mean(1)], dim=1).cpu()


def frechet(prediction: Tensor, truth: Tensor) -> float:
    """Fréchet distance of two sets of vectors (N, D), as Gaussians."""
    metric = FrechetInceptionDistance(feature=nn.Identity(), input_img_size=(prediction.shape[1],))
    metric.update(truth, real=True)
    metric.update(prediction, real=False)
    return float(metric.compute())


def frechet_ci(prediction: Tensor, truth: Tensor, *, resamples: int = 50, seed: int = 0) -> tuple[float, float, float]:
    """(value, low, high): 95 % bootstrap over clips, pairs kept together. A resample repeats clips, which lifts the
    distance a little."""
    rng = np.random.default_rng(seed)
    draws = [torch.from_numpy(rng.integers(len(truth), size=len(truth))) for _ in range(resamples)]
    low, high = np.quantile([frechet(prediction[draw], truth[draw]) for draw in draws], [0.025, 0.975])
    return frechet(prediction, truth), float(low), float(high)
