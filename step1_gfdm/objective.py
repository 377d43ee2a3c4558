"""What the denoiser learns and how a sampler uses it: EDM as SVD and VPP train it, and DDPM (Sec. 3.1, Eqs. 1-3).

A `net(x_in, timestep)` is the network alone: scaled noisy latents (B, F, c, h, w) and times (B,) -> its raw output of
the
same shape. Text, first frame and guidance live inside it. Schedules run from pure noise (entry 0) to clean.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Net = Callable[[Tensor, Tensor], Tensor]


class Objective(ABC):
    """One loss and one sampler. Subclasses say what a noise level is; walking a schedule is the same for all."""

    @abstractmethod
    def training_loss(self, net: Net, x_start: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B, F, c, h, w) -> () loss, one noise level a sample, shared by its frames."""

    @abstractmethod
    def noise_levels(self, steps: int) -> list[float]:
        """The noise levels that a sampler of `steps` steps visits, noisiest first."""

    @abstractmethod
    def scale_initial_noise(self, noise: Tensor) -> Tensor:
        """Unit Gaussian noise -> the state at the noisiest level."""

    @abstractmethod
    def network_input(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """State at a level -> what the network gets: (x_in, timestep (B,))."""

    @abstractmethod
    def predict_x_start(self, out: Tensor, x: Tensor, level: float) -> Tensor:
        """The network's raw output for a state -> its guess of the clean latents."""

    @abstractmethod
    def step(self, x: Tensor, x_start: Tensor, level: float, next_level: float) -> Tensor:
        """One deterministic sampler step towards the guess, from one level to the next."""

    def network_input_after(
        self, net: Net, noise: Tensor, *, schedule_steps: int, num_steps: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Walk `taken` steps of a schedule and return what the network would be given next.

        `taken=0` costs no network call: this is the single denoising step whose features the policy reads (Sec. 3.1).
        """
        levels = self.noise_levels(schedule_steps)
        if not 0 <= num_steps < len(levels):
            raise ValueError(
                f"{num_steps + 1} denoising steps asked of a schedule with {len(levels)} steps; raise schedule_steps"
            )
        x = self.scale_initial_noise(noise)
        for level, next_level in zip(levels[:num_steps], levels[1:]):
            x = self.step(x, self._denoise(net, x, level), level, next_level)
        return self.network_input(x, levels[num_steps])

    def sample(self, net: Net, noise: Tensor, *, steps: int) -> Tensor:
        """Unit Gaussian noise (B, F, c, h, w) -> clean latents after `steps` network calls."""
        levels = self.noise_levels(steps)
        x = self.scale_initial_noise(noise)
        for level, next_level in zip(levels, levels[1:]):
            x = self.step(x, self._denoise(net, x, level), level, next_level)
        # the last step goes to noise level zero, where a deterministic sampler lands on the guess itself
        return self._denoise(net, x, levels[-1])

    def denoise_once(self, net: Net, noise: Tensor) -> Tensor:
        """The guess of the clean latents after the one step that `imagine` takes."""
        return self.sample(net, noise, steps=1)

    def _denoise(self, net: Net, x: Tensor, level: float) -> Tensor:
        return self.predict_x_start(net(*self.network_input(x, level)).to(x.dtype), x, level)


class EDM(Objective):
    """Karras et al. (2022) with SVD's preconditioning: sigma_data 1, v-prediction, Euler on Karras sigmas."""

    def __init__(
        self,
        *,
        p_mean: float = 0.7,
        p_std: float = 1.6,
        sigma_min: float = 0.002,
        sigma_max: float = 700.0,
        rho: float = 7.0,
    ) -> None:
        self.p_mean, self.p_std = p_mean, p_std
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    @staticmethod
    def scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noise level -> c_skip, c_out, c_in, c_noise."""
        total = (sigma**2 + 1).sqrt()
        return 1 / total**2, -sigma / total, 1 / total, sigma.log() / 4

    def training_loss(self, net: Net, x_start: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        draw = torch.randn(len(x_start), generator=generator, device=x_start.device)
        sigma = (self.p_mean + self.p_std * draw).exp().view(-1, 1, 1, 1, 1)
        noise = torch.randn(x_start.shape, generator=generator, device=x_start.device, dtype=x_start.dtype)
        x = x_start + sigma * noise
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        guess = c_out * net(c_in * x, c_noise.flatten()) + c_skip * x
        weight = (sigma**2 + 1) / sigma**2
        return (weight * (guess.float() - x_start.float()) ** 2).mean()

    def noise_levels(self, steps: int) -> list[float]:
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((high + ramp * (low - high)) ** self.rho).tolist()

    def scale_initial_noise(self, noise: Tensor) -> Tensor:
        # SVD's scheduler starts at sqrt(sigma^2 + 1), so that the network's first input is exactly unit Gaussian
        return noise * math.sqrt(self.sigma_max**2 + 1)

    def network_input(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        return x / math.sqrt(level**2 + 1), x.new_full((len(x),), math.log(level) / 4, dtype=torch.float32)

    def predict_x_start(self, out: Tensor, x: Tensor, level: float) -> Tensor:
        return x / (level**2 + 1) - out * (level / math.sqrt(level**2 + 1))

    def step(self, x: Tensor, x_start: Tensor, level: float, next_level: float) -> Tensor:
        return x + (x - x_start) * ((next_level - level) / level)


class DDPM(Objective):
    """Eqs. 1-3: variance schedule beta_1..beta_S, noise prediction or v, DDIM as the sampler.

    `beta_schedule` is "linear" or "scaled_linear" (linear in sqrt(beta), as Stable Diffusion); the paper names none.
    """

    def __init__(
        self,
        *,
        prediction: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
    ) -> None:
        if prediction not in ("epsilon", "v"):
            raise ValueError(f"DDPM predicts 'epsilon' or 'v', not {prediction!r}")
        if beta_schedule == "linear":
            beta = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        elif beta_schedule == "scaled_linear":
            beta = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
        else:
            raise ValueError(f"beta_schedule is 'linear' or 'scaled_linear', not {beta_schedule!r}")
        self.prediction, self.num_train_timesteps = prediction, num_train_timesteps
        self.alphas_cumprod = (1 - beta).cumprod(0)

    def training_loss(self, net: Net, x_start: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        s = torch.randint(0, self.num_train_timesteps, (len(x_start),), generator=generator, device=x_start.device)
        noise = torch.randn(x_start.shape, generator=generator, device=x_start.device, dtype=x_start.dtype)
        alphas_cumprod = self.alphas_cumprod.to(x_start.device)[s].view(-1, 1, 1, 1, 1)
        signal_rate, noise_rate = alphas_cumprod.sqrt().to(x_start.dtype), (1 - alphas_cumprod).sqrt().to(x_start.dtype)
        out = net(signal_rate * x_start + noise_rate * noise, s.float())
        target = noise if self.prediction == "epsilon" else signal_rate * noise - noise_rate * x_start
        return ((out.float() - target.float()) ** 2).mean()

    def noise_levels(self, steps: int) -> list[float]:
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"{steps} sampling steps asked of a DDPM with {self.num_train_timesteps} noise levels")
        # trailing spacing: the first step is the noisiest one that training saw
        return [round(self.num_train_timesteps - i * self.num_train_timesteps / steps) - 1.0 for i in range(steps)]

    def scale_initial_noise(self, noise: Tensor) -> Tensor:
        return noise

    def network_input(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        return x, x.new_full((len(x),), level, dtype=torch.float32)

    def predict_x_start(self, out: Tensor, x: Tensor, level: float) -> Tensor:
        signal_rate, noise_rate = self._signal_and_noise_rates(level)
        return (
            (x - noise_rate * out) / signal_rate if self.prediction == "epsilon" else signal_rate * x - noise_rate * out
        )

    def step(self, x: Tensor, x_start: Tensor, level: float, next_level: float) -> Tensor:
        signal_rate, noise_rate = self._signal_and_noise_rates(level)
        noise = (x - signal_rate * x_start) / noise_rate
        signal_rate, noise_rate = self._signal_and_noise_rates(next_level)
        return signal_rate * x_start + noise_rate * noise

    def _signal_and_noise_rates(self, level: float) -> tuple[float, float]:
        alphas_cumprod = self.alphas_cumprod[int(level)].item()
        return math.sqrt(alphas_cumprod), math.sqrt(1 - alphas_cumprod)
