"""AdamW and its learning-rate schedule (Table 10).

They are built together, so that the schedule drives the optimizer in use. VPP and the official release call
configure_optimizers() twice and schedule the copy that is never stepped, so their learning rate stays constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from common.contracts import TrainableModel
from common.errors import UserError


def build_optimizer(
    model: TrainableModel,
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
    """The optimizer over the parameters that require gradients, and its schedule, under diffusers' name.

    Weight decay applies to matrices and not to vectors (norms, biases), unless `decay_all`. `lr_multipliers`: name of a
    direct child of the model -> factor on `lr`. A model with `parameter_groups()` decides both itself. Raises
    UserError.
    """
    groups = model.parameter_groups()
    if groups is None:
        groups = _decay_groups(model, weight_decay, decay_all, lr, lr_multipliers or {})
    if not any(group["params"] for group in groups):
        raise UserError("nothing to train: no parameter requires a gradient")
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps, fused=True)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    return optimizer, scheduler


def _decay_groups(
    model: nn.Module, weight_decay: float, decay_all: bool, lr: float, lr_multipliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    if unknown := sorted(lr_multipliers.keys() - dict(model.named_children()).keys()):
        raise UserError(
            f"loop.optimizer.lr_multipliers names {unknown}, which are no parts of the model; its parts: "
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
