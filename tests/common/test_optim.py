"""The optimizer: factors of parts, and a schedule that drives the optimizer in use."""

from __future__ import annotations

import pytest
from torch import nn

from common import optim
from common.contracts import TrainableModel
from common.errors import UserError


def model() -> TrainableModel:
    whole = TrainableModel()
    whole.gidm, whole.adapter = nn.Linear(2, 2), nn.Linear(2, 2)
    return whole


def test_a_part_may_have_a_factor_on_the_learning_rate_and_the_schedule_keeps_it() -> None:
    whole = model()
    optimizer, scheduler = optim.build_optimizer(
        whole,
        lr=1e-3,
        weight_decay=0.1,
        lr_multipliers={"gidm": 0.25},
        schedule="constant_with_warmup",
        warmup_steps=2,
        total_steps=10,
    )
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in whole.gidm.parameters()} == {2.5e-4} and {
        rates[id(p)] for p in whole.adapter.parameters()
    } == {1e-3}
    assert decays[id(whole.gidm.weight)] == 0.1 and decays[id(whole.gidm.bias)] == 0.0
    assert scheduler.get_last_lr()[0] == 1e-3  # the rate that is logged is that of the parts without a factor


def test_a_factor_of_no_part_is_refused() -> None:
    with pytest.raises(UserError, match=r"\['gadapter'\].*adapter"):
        optim.build_optimizer(model(), lr=1e-3, weight_decay=0.1, lr_multipliers={"gadapter": 0.5}, total_steps=10)
