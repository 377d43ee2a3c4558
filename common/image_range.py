"""The two ranges of pixel values, and the only place that converts between them.

Video files, DINOv2 and the inverse model use [0, 1]. SVD's VAE, the forward models and the views of PolicyBatch use
[-1, 1]. The names are those of diffusers' VaeImageProcessor.
"""

from __future__ import annotations

from torch import Tensor


def normalize(images: Tensor) -> Tensor:
    """Images of any shape in [0, 1] -> the same in [-1, 1]."""
    return images * 2 - 1


def denormalize(images: Tensor) -> Tensor:
    """Images of any shape in [-1, 1] -> the same in [0, 1]. Values outside [-1, 1] are not clamped."""
    return (images + 1) / 2
