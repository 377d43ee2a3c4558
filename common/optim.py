"""AdamW and its schedule, returned together so that the schedule drives the optimizer in use (Table 10).

VPP and the official release build the optimizer twice and schedule the copy that nobody steps (facts: vpp.md 5.5).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn


def build(model: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8,
          decay_all: bool = False, schedule: str = "constant_with_warmup", warmup_steps: int = 0,
          total_steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer over what requires gradients, and the schedule bound to it. `schedule` is a name that diffusers knows.

    A model may bring its own `parameter_groups()`; otherwise matrices decay and vectors (norms, biases) do not.
    """
    groups = model.parameter_groups() if hasattr(model, "parameter_groups") else None
    if groups is None:
        groups = _decay_groups(model, weight_decay, decay_all)
    if not any(group["params"] for group in groups):
        raise ValueError("nothing to train: no parameter requires a gradient")
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps, fused=True)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    return optimizer, scheduler


def _decay_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if decay_all or p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if not decay_all and p.ndim < 2], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
