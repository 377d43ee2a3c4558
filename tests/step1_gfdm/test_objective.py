"""EDM and DDPM against their definitions and against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from step1_gfdm.objective import DDPM, EDM

SHAPE = (3, 4, 4, 8, 8)
OBJECTIVES = [EDM(), DDPM(), DDPM(prediction_type="v_prediction")]


def perfect_edm(clean):
    """A network with which EDM predicts `clean`: v at noise level sigma."""

    def net(x_in, timestep):
        sigma = (4 * timestep).exp().view(-1, 1, 1, 1, 1)
        x = x_in * (sigma**2 + 1).sqrt()
        return (clean - x / (sigma**2 + 1)) * -((sigma**2 + 1).sqrt() / sigma)

    return net


def perfect_ddpm(objective, clean):
    def net(x_in, timestep):
        alphas_cumprod = objective.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1, 1).float()
        noise = (x_in - alphas_cumprod.sqrt() * clean) / (1 - alphas_cumprod).sqrt()
        return (
            noise
            if objective.prediction_type == "epsilon"
            else alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * clean
        )

    return net


def perfect(objective, clean):
    return perfect_edm(clean) if isinstance(objective, EDM) else perfect_ddpm(objective, clean)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_perfect_network_has_no_loss_and_samples_the_truth(objective):
    clean = torch.randn(SHAPE)
    assert objective.training_loss(perfect(objective, clean), clean, generator=torch.Generator().manual_seed(1)) < 1e-6
    for steps in (1, 4):
        torch.testing.assert_close(
            objective.sample(perfect(objective, clean), torch.randn(SHAPE), steps=steps), clean, atol=2e-3, rtol=2e-3
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_seeded_and_has_gradient(objective):
    clean, scale = torch.randn(SHAPE), torch.ones((), requires_grad=True)
    losses = [
        objective.training_loss(lambda x, t: scale * x, clean, generator=torch.Generator().manual_seed(s))
        for s in (3, 3, 4)
    ]
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert scale.grad.abs() > 0


def test_edm_scalings_at_their_limits():
    skip, out, scale_in, noise = EDM.scalings(torch.tensor([1e-4, 1.0, 1e4]))
    torch.testing.assert_close(skip, torch.tensor([1.0, 0.5, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(out, torch.tensor([0.0, -math.sqrt(0.5), -1.0]), atol=2e-4, rtol=0)
    torch.testing.assert_close(scale_in, torch.tensor([1.0, math.sqrt(0.5), 0.0]), atol=2e-4, rtol=0)
    torch.testing.assert_close(noise, torch.tensor([1e-4, 1.0, 1e4]).log() / 4)


def test_edm_loss_of_a_zero_network_follows_its_definition():
    """Where the network returns 0, the error is c_skip * x - clean, and (sigma^2 + 1) / sigma^2 weighs its square."""
    clean = torch.randn(2000, 1, 1, 1, 1)
    loss = EDM(p_mean=0.7, p_std=0.0).training_loss(
        lambda x, t: torch.zeros_like(x), clean, generator=torch.Generator().manual_seed(0)
    )
    sigma = math.exp(0.7)
    expected = (sigma**4 / (sigma**2 + 1) ** 2 + sigma**2 / (sigma**2 + 1) ** 2) * (sigma**2 + 1) / sigma**2
    assert loss.item() == pytest.approx(expected, rel=0.1)


def test_edm_trains_on_vpps_noise_levels():
    times = []
    EDM().training_loss(lambda x, t: times.append(t) or x, torch.randn(20000, 1, 1, 1, 1))
    log_sigma = 4 * times[0]
    assert log_sigma.mean().item() == pytest.approx(0.7, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(1.6, abs=0.05)


def test_first_step_is_unit_noise_at_sigma_700_whatever_the_schedule():
    noise = torch.randn(SHAPE)
    for steps in (2, 20):
        x, time = EDM().network_input_after(None, noise, schedule_steps=steps)
        torch.testing.assert_close(x, noise)
        assert time.tolist() == pytest.approx([1.6378] * 3, abs=1e-4)


@pytest.mark.parametrize("steps", [2, 7])
def test_edm_sampler_equals_diffusers_euler(steps):
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )
    net = lambda x, t: torch.tanh(x) * 0.3 + t.view(-1, 1, 1, 1, 1) * 0.1  # noqa: E731
    noise = torch.randn(SHAPE)
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, time), time.expand(3).float()), time, x).prev_sample
    torch.testing.assert_close(EDM().sample(net, noise, steps=steps), x, atol=1e-3, rtol=1e-3)


def test_one_edm_step_starts_at_sigma_max():
    """Not every version of diffusers can be set to one step, so this is compared with the definition."""
    assert EDM().noise_levels(1) == [pytest.approx(700.0)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_sampler_equals_diffusers_ddim(prediction_type):
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(10)
    objective = DDPM(prediction_type=prediction_type)
    assert objective.noise_levels(10) == scheduler.timesteps.tolist()
    net = lambda x, t: torch.tanh(x) + t.view(-1, 1, 1, 1, 1) * 1e-4  # noqa: E731
    x = noise = torch.randn(SHAPE)
    for time in scheduler.timesteps:
        x = scheduler.step(net(x, time.expand(3).float()), time, x).prev_sample
    torch.testing.assert_close(objective.sample(net, noise, steps=10), x, atol=1e-3, rtol=1e-3)


def test_network_input_after_some_steps_is_that_of_the_sampler():
    """The features of denoising step n come from the input of the n-th call of a sampler of the same schedule."""
    for objective in OBJECTIVES:
        seen = []
        noise = torch.randn(SHAPE)

        def net(x, t, seen=seen):
            seen.append((x, t))
            return torch.tanh(x)

        objective.sample(net, noise, steps=6)
        x, time = objective.network_input_after(lambda x, t: torch.tanh(x), noise, schedule_steps=6, num_steps=4)
        torch.testing.assert_close((x, time), seen[4])


def test_refusals():
    with pytest.raises(ValueError, match="raise schedule_steps"):
        EDM().network_input_after(None, torch.randn(SHAPE), schedule_steps=5, num_steps=5)
    with pytest.raises(ValueError, match="epsilon"):
        DDPM(prediction_type="sample")
    with pytest.raises(ValueError, match="beta_schedule"):
        DDPM(beta_schedule="cosine")
    with pytest.raises(ValueError, match="the 1000 timesteps"):
        DDPM().noise_levels(1001)
