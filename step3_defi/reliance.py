"""How much the action adapter relies on what it reads: what a wrong stream costs, and whether a stream varies at all
(Sec. 3.3, Table 4).

B batch, k noise draws of a sample, T tokens, C channels, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOTION, GRIPPER = slice(0, 6), slice(6, 7)  # of CALVIN's seven action dimensions


def swap_samples(stream: Tensor) -> Tensor:
    """Every sample gets its neighbour's: (B, ...) -> (B, ...)."""
    return stream[
        torch.arange(len(stream), device=stream.device).roll(1)
    ]  # rolling itself fails on fp16 under a CPU's autocast to bf16


def average_samples(stream: Tensor) -> Tensor:
    """Every sample gets the mean of the batch: (B, ...) -> (B, ...)."""
    return stream.float().mean(0, keepdim=True).expand_as(stream).to(stream.dtype)


ABLATIONS = {"swap": swap_samples, "mean": average_samples}


def loss_increase(wrong: Tensor, own: Tensor) -> dict[str, Tensor]:
    """Squared errors (B * k, A, 7) with a wrong stream and with the right ones -> the rise, as a share of the right
    ones' mean.

    "all" is the rise of the whole loss, "motion" that of the six pose commands and "gripper" that of the gripper, each
    over its own loss.
    """
    parts = {"all": slice(None), "motion": MOTION, "gripper": GRIPPER}
    return {name: wrong[..., part].mean() / own[..., part].mean() - 1 for name, part in parts.items()}


def deviation(stream: Tensor) -> Tensor:
    """Root mean square, over tokens and channels, of the deviation over samples: (B, T, C) -> ()."""
    return stream.detach().float().var(0, correction=0).mean().sqrt()


def spread(stream: Tensor) -> Tensor:
    """The deviation over samples as a share of the root mean square: (B, T, C) -> (), 0 for a stream that is constant
    over samples."""
    stream = stream.detach().float()
    return deviation(stream) / stream.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
