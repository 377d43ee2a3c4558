from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from step3_defi.adapter import ActionAdapter
from step3_defi.edm import ActionEDM, seeded_noise
from tests.step3_defi.parts import wake


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = ActionAdapter({"video": (5, 4), "latent": (3, 6)}, 7, dim=16, layers=2, num_heads=2, dropout=0.0)


def awake() -> ActionAdapter:
    holder = Holder()
    wake(holder)
    return holder.adapter.eval()


def inputs(batch: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.randn(batch, 7), {"video": torch.randn(batch, 5, 4), "latent": torch.randn(batch, 3, 6)}


def test_nothing_is_blind() -> None:
    adapter = awake()
    context = adapter.encode(*inputs(1))
    tokens = context.tokens.detach().requires_grad_()
    out = adapter(torch.randn(1, 10, 7), torch.ones(1), context._replace(tokens=tokens))
    for query in range(10):
        (gradient,) = torch.autograd.grad(out[0, query].sum(), tokens, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 1e-6).all(), f"action {query} does not see the whole context"


def test_actions_have_an_order_and_attend_to_each_other() -> None:
    adapter = awake()
    context = adapter.encode(*inputs(1))
    noisy = torch.randn(1, 10, 7, requires_grad=True)
    out = adapter(noisy, torch.ones(1), context)
    for query in (0, 9):  # no causal mask
        (gradient,) = torch.autograd.grad(out[0, query].sum(), noisy, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 1e-6).all()
    assert not torch.allclose(adapter(noisy.flip(1), torch.ones(1), context).flip(1), out, atol=1e-4)


def test_context_tokens_have_places() -> None:
    adapter = awake()
    goal, streams = inputs(1)
    noisy = torch.randn(1, 10, 7)
    out = adapter(noisy, torch.ones(1), adapter.encode(goal, streams))
    streams["latent"] = streams["latent"].flip(1)
    assert not torch.allclose(adapter(noisy, torch.ones(1), adapter.encode(goal, streams)), out, atol=1e-4)


def test_draws_share_a_context_but_nothing_else() -> None:
    adapter = awake()
    goal, streams = inputs(2)
    noisy, sigma = torch.randn(6, 10, 7), torch.rand(6) + 0.1
    together = adapter(noisy, sigma, adapter.encode(goal, streams))
    repeated = adapter.encode(goal.repeat_interleave(3, 0), {k: v.repeat_interleave(3, 0) for k, v in streams.items()})
    assert torch.allclose(together, adapter(noisy, sigma, repeated), atol=1e-5)


def test_starts_as_zero_and_names_foreign_streams() -> None:
    adapter = Holder().adapter
    assert not adapter(torch.randn(2, 10, 7), torch.ones(2), adapter.encode(*inputs(2))).any()
    with pytest.raises(ValueError, match="video"):
        adapter.encode(torch.randn(1, 7), {"picture": torch.randn(1, 5, 4)})


def test_perfect_denoiser_is_reached_and_sampled() -> None:
    """If all data is one point, the ideal network has zero loss, and the sampler reaches the point."""
    edm, point = ActionEDM(num_inference_steps=10), torch.rand(4, 10, 7) * 2 - 1

    def ideal(scaled: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        c_skip, c_out, c_in = edm.scalings(sigma)
        return (point - c_skip * scaled / c_in) / c_out

    assert edm.squared_errors(ideal, point).mean() < 1e-6
    assert torch.allclose(edm.sample(ideal, torch.randn(4, 10, 7)), point, atol=1e-4)


def test_sampler_follows_gaussian_data() -> None:
    """For N(mean, s^2) the ideal denoiser is linear; samples deviate as the data does, up to the sampler's error."""
    edm, mean, spread = ActionEDM(num_inference_steps=40), 0.3, 0.2

    def ideal(scaled: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        c_skip, c_out, c_in = edm.scalings(sigma)
        noisy, variance = scaled / c_in, sigma.view(-1, 1, 1) ** 2
        clean = (spread**2 * noisy + variance * mean) / (spread**2 + variance)
        return (clean - c_skip * noisy) / c_out

    samples = edm.sample(ideal, torch.randn(500, 10, 7))
    assert abs(samples.mean() - mean) < 0.01 and abs(samples.std() - spread) < 0.04
    edm.temperature = 0.0
    assert (edm.sample(ideal, torch.randn(500, 10, 7)) - mean).abs().max() < 0.001, "without noise it walks to the mean"
    with pytest.raises(ValueError, match="temperature=-1"):
        ActionEDM(temperature=-1.0)


def test_noise_levels() -> None:
    torch.manual_seed(0)
    sigma = ActionEDM().sample_noise_levels(40_000)
    assert sigma.min() >= 0.001 and sigma.max() <= 80 and abs(sigma.median() - 0.5) < 0.02
    assert abs((sigma < 0.5 * math.e**0.5).float().mean() - 1 / (1 + math.exp(-1))) < 0.01  # logistic, scale 0.5
    schedule = ActionEDM(num_inference_steps=10).get_sigmas()
    assert len(schedule) == 11 and schedule[0] == 80 and abs(schedule[-2] - 0.001) < 1e-6 and schedule[-1] == 0
    assert torch.allclose(schedule[1:10] / schedule[:9], schedule[1] / schedule[0], atol=1e-4)
    assert ActionEDM(sample_sigma_min=1.0).get_sigmas()[-2] == 1.0


def test_noise_of_a_row_depends_on_its_seed_only() -> None:
    many = seeded_noise([3, 5, 3], (10, 7))
    assert (
        torch.equal(many[0], many[2])
        and torch.equal(many[1], seeded_noise([5], (10, 7))[0])
        and not torch.equal(many[0], many[1])
    )


def test_full_size() -> None:
    with torch.device("meta"):
        adapter = ActionAdapter({"video": (224, 384), "latent": (24, 768), "future": (96, 768)}, 512)
    assert sum(p.numel() for p in adapter.blocks.parameters()) == 12 * (
        384 * 384 * 22 + 384 * 21
    )  # two attentions, MLP and modulation have 4, 4, 8 and 6 matrices of 384 x 384
    assert sum(p.numel() for p in adapter.parameters()) == pytest.approx(40.9e6, rel=0.02)
