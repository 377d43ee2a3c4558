"""Standardisation by running statistics."""

from __future__ import annotations

import pytest
import torch

from common.standardize import RunningNorm


def batches(count: int, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    offset, scale = torch.tensor([100.0, -3.0, 0.0]), torch.tensor([50.0, 0.1, 1.0])
    return [offset + scale * torch.randn(size, 2, 4, 3, generator=generator) for _ in range(count)]


def test_statistics_become_those_of_the_training_data() -> None:
    norm, data = RunningNorm(3), batches(60)
    for batch in data:
        norm(batch)
    out = norm.eval()(torch.cat(data)).flatten(0, -2)
    assert torch.allclose(out.mean(0), torch.zeros(3), atol=0.1) and torch.allclose(
        out.std(0), torch.ones(3), atol=0.05
    )
    restored = RunningNorm(3).eval()
    restored.load_state_dict(norm.state_dict())
    assert torch.equal(restored(data[0]), norm(data[0]))


def test_eval_mode_changes_no_statistics_and_samples_are_independent() -> None:
    norm, data = RunningNorm(3), batches(4)
    norm(data[0])
    norm.eval()
    before = norm.mean.clone()
    together = norm(data[1])
    assert torch.equal(norm.mean, before) and torch.equal(together[:1], norm(data[1][:1]))


def test_all_positions_are_measured_in_turn_and_processes_agree_with_one_large_batch() -> None:
    x = torch.zeros(4, 2, 7, 1)
    x[:, 0, 3] = 1.0  # one position of 14
    norm = RunningNorm(1)
    for _ in range(7):
        norm(x)
    assert norm.mean.item() == pytest.approx(1 / 14)
    whole, halves = RunningNorm(3), [RunningNorm(3), RunningNorm(3)]
    for batch in batches(5):
        whole(batch)
        for half, part in zip(halves, batch.split(4)):
            half(part)
    torch.testing.assert_close(whole.mean, (halves[0].mean + halves[1].mean) / 2)


def test_a_dead_channel_stays_finite_and_gradients_pass() -> None:
    norm = RunningNorm(3)
    x = torch.zeros(4, 2, 3, requires_grad=True)
    norm(x).sum().backward()
    assert torch.isfinite(norm(x)).all() and torch.isfinite(x.grad).all() and x.grad.any()
