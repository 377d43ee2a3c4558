"""Metrics of several steps: picture quality, use of codes, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of (N, 3, H, W) pictures in [0, 1] -> (N,) decibels."""
    error = (prediction.float() - truth.float()).square().flatten(1).mean(1).clamp_min(1e-10)
    return -10 * torch.log10(error)


def ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of (N, 3, H, W) pictures in [0, 1] -> (N,)."""
    value = structural_similarity_index_measure(prediction.float(), truth.float(), data_range=1.0, reduction="none")
    return value.reshape(-1)


def code_counts(codes: Tensor, size: int) -> Tensor:
    """Indices (B, K) into `size` codes -> (K, size), the number of times that each occurs at each position."""
    counts = torch.zeros(codes.shape[1], size, dtype=torch.long, device=codes.device)
    return counts.scatter_add_(1, codes.T, torch.ones_like(codes.T))  # bincount would wait for the device


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of a histogram: the number of codes, if all were used equally often."""
    share = counts[counts > 0].float()
    share = share / share.sum()
    return (-(share * share.log()).sum()).exp()


def bootstrap_ci(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over independent values."""
    values = np.asarray(values, dtype=float)
    if not values.size:
        raise ValueError("bootstrap_ci needs at least one value")
    draws = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    low, high = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
