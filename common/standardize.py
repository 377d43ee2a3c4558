"""Standardisation of channels by running statistics (Sec. 3.3; the bins of Table 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """Brings every channel to mean 0 and standard deviation 1 over the training data, by running statistics.

    The channels of a UNet differ from each other in offset and scale far more than from picture to picture. Statistics
    of the batch would let samples influence each other, and do not exist at inference. In training mode the statistics
    are updated from every `token_stride`-th token of a sample, beginning one token later at every batch, so that every
    position is measured in turn. They are averaged over all processes. `eps` is added to every variance.
    """

    mean: Tensor
    square: Tensor
    batches: Tensor

    def __init__(self, channels: int, momentum: float = 0.01, token_stride: int = 7, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.token_stride, self.eps = momentum, token_stride, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) -> (..., channels)."""
        rows = x.flatten(0, -2).float()
        if self.training:
            with torch.no_grad():
                self._measure(rows.unflatten(0, (len(x), -1)))
        # a copy of the mean: a second pass before the backward pass of the first would change a tensor autograd saved
        variance = (self.square - self.mean.square()).clamp(min=0)
        return F.batch_norm(rows, self.mean.clone(), variance, training=False, eps=self.eps).view_as(x).to(x.dtype)

    def _measure(self, tokens: Tensor) -> None:
        places = torch.arange(0, tokens.shape[1], self.token_stride, device=tokens.device)
        seen = tokens[:, (places + self.batches) % tokens.shape[1]].flatten(0, 1)
        mean, square = reduce(torch.stack([seen.mean(0), seen.square().mean(0)]), reduction="mean")
        self.batches += 1
        share = (1 / self.batches).clamp(min=self.momentum)  # a plain mean over the first batches
        self.mean += share * (mean - self.mean)
        self.square += share * (square - self.square)
