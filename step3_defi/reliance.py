"""How much the action adapter relies on what it reads (Sec. 3.3, Table 4).

The action loss is measured again with a wrong stream in place of the right one; and the spread of a stream says whether
it varies over samples at all. B batch, k noise draws of a sample, T tokens, C channels, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOTION, GRIPPER = slice(0, 6), slice(6, 7)  # of the seven numbers of an action in CALVIN


def swap_samples(stream: Tensor) -> Tensor:
    """Give every sample the stream of its neighbour in the batch: (B, ...) -> (B, ...)."""
    # Indexed, because Tensor.roll on fp16 fails under the CPU's autocast to bf16.
    return stream[torch.arange(len(stream), device=stream.device).roll(1)]


def average_samples(stream: Tensor) -> Tensor:
    """Give every sample the mean of the batch: (B, ...) -> (B, ...)."""
    return stream.float().mean(0, keepdim=True).expand_as(stream).to(stream.dtype)


ABLATIONS = {"swap": swap_samples, "mean": average_samples}


def loss_increase(wrong: Tensor, own: Tensor) -> dict[str, Tensor]:
    """By what share the action loss rises with a wrong stream; 0.1 means 10 %.

    wrong, own: squared errors (B*k, A, 7) with the wrong stream and with the right one. "all" is the rise of the whole
    loss, "motion" that of the six pose commands, "gripper" that of the gripper, each over its own loss.
    """
    parts = {"all": slice(None), "motion": MOTION, "gripper": GRIPPER}
    return {name: wrong[..., part].mean() / own[..., part].mean() - 1 for name, part in parts.items()}


def deviation(stream: Tensor) -> Tensor:
    """Standard deviation over samples, as root mean square over tokens and channels: (B, T, C) -> ()."""
    return stream.detach().float().var(0, correction=0).mean().sqrt()


def spread(stream: Tensor) -> Tensor:
    """`deviation` over the root mean square of the stream: (B, T, C) -> (). It is 0 when all samples are equal."""
    stream = stream.detach().float()
    return deviation(stream) / stream.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
