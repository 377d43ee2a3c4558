"""Metrics that need a pretrained network: LPIPS of frames, and a Fréchet distance of videos (Fig. 9).

LPIPS follows Zhang et al. (2018), the Fréchet distance of videos Unterthiner et al. (2018). The network is named
beside every result, because numbers from different networks or weights cannot be compared.
N frames or videos, B batch, F frames of a video, E width of DINOv2's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from torchmetrics.image.fid import FrechetInceptionDistance

from common.frozen import DinoV2, dinov2


class MetricUnavailable(RuntimeError):
    """A metric's network is not on this machine. The message says which, and where it comes from."""


def lpips(net: str) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with the network "alex", "vgg" or "squeeze": two of (N, 3, H, W) in [0, 1] -> (N,).

    Raises MetricUnavailable where torchvision cannot find or download its weights.
    """

    def distance(prediction: Tensor, target: Tensor) -> Tensor:
        return learned_perceptual_image_patch_similarity(
            prediction.float().clamp(0, 1), target.float().clamp(0, 1), net_type=net, reduction="none", normalize=True
        ).reshape(-1)

    try:
        distance(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    except OSError as error:  # torchvision looks in torch's hub folder first, then on the internet
        raise MetricUnavailable(
            f"LPIPS is left out: torchvision's {net} weights are not in {torch.hub.get_dir()} and cannot be downloaded "
            f"({error})"
        ) from error
    return distance


class VideoFeatureExtractor:
    """A video as one vector, from DINOv2's tokens averaged over each frame.

    The vector holds their mean over time and the mean absolute difference of consecutive frames.
    path: DINOv2's weights. image_size: side of its input. Raises MetricUnavailable where the weights are missing.
    """

    def __init__(self, path: str | Path, image_size: int, device: torch.device) -> None:
        try:
            self.vision: DinoV2 = dinov2(path, image_size).to(device)
        except FileNotFoundError as error:
            raise MetricUnavailable(f"the Fréchet distance is left out: {error}") from error
        self.name = f"DINOv2 from {path}"

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, F, 3, H, W) in [0, 1] -> (B, 2 E) on the CPU."""
        frames = rearrange(videos.float().clamp(0, 1), "b f c h w -> (b f) c h w")
        tokens = self.vision(frames).mean(1)  # (B * F, E)
        tokens = rearrange(tokens, "(b f) e -> b f e", b=len(videos))
        return torch.cat([tokens.mean(1), tokens.diff(dim=1).abs().mean(1)], dim=1).cpu()  # (B, 2 E)


def frechet(prediction: Tensor, target: Tensor) -> float:
    """Fréchet distance of the Gaussians that fit two sets of vectors (N, E)."""
    metric = FrechetInceptionDistance(feature=nn.Identity(), input_img_size=(prediction.shape[1],))
    metric.update(target, real=True)
    metric.update(prediction, real=False)
    return float(metric.compute())


def frechet_ci(prediction: Tensor, target: Tensor, *, resamples: int = 50, seed: int = 0) -> tuple[float, float, float]:
    """The distance of two sets of vectors (N, E) and its 95 % bootstrap interval over clips: (value, low, high).

    Prediction and target of a clip are resampled together. A resample holds some clips more than once, which raises the
    distance a little.
    """
    rng = np.random.default_rng(seed)
    draws = [torch.from_numpy(rng.integers(len(target), size=len(target))) for _ in range(resamples)]
    low, high = np.quantile([frechet(prediction[draw], target[draw]) for draw in draws], [0.025, 0.975])
    return frechet(prediction, target), float(low), float(high)
