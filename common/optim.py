"""AdamW and its schedule, returned together so that the schedule drives the optimizer in use (Table 10).

VPP and the official release build the optimizer twice and schedule the copy that nobody steps (facts: vpp.md 5.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay_all: bool = False,
    lr_multipliers: Mapping[str, float] | None = None,
    schedule: str = "constant_with_warmup",
    warmup_steps: int = 0,
    total_steps: int,
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer over what requires gradients, and the schedule bound to it. `schedule` is a name that diffusers
    knows.

    A model may bring its own `parameter_groups()`; otherwise matrices decay and vectors (norms, biases) do not.
    `lr_multipliers` names parts
    of the model (its direct children) whose learning rate is that many times `lr`.
    """
    groups = model.parameter_groups() if hasattr(model, "parameter_groups") else None
    if groups is None:
        groups = _decay_groups(model, weight_decay, decay_all, lr, lr_multipliers or {})
    if not any(group["params"] for group in groups):
        raise ValueError("nothing to train: no parameter requires a gradient")
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps, fused=True)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    return optimizer, scheduler


def _decay_groups(
    model: nn.Module, weight_decay: float, decay_all: bool, lr: float, lr_multipliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    if unknown := sorted(lr_multipliers.keys() - dict(model.named_children()).keys()):
        raise ValueError(
            f"optimizer.factors names {unknown}, which are no parts of the model; its parts: "
            f"{sorted(dict(model.named_children()))}"
        )
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays, factor = decay_all or parameter.ndim >= 2, lr_multipliers.get(name.split(".")[0], 1.0)
            group = groups.setdefault(
                (decays, factor), {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr": factor * lr}
            )
            group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: (-group["lr"], -group["weight_decay"]))
