"""Training objectives and their samplers: EDM as SVD and VPP train it, and DDPM (Sec. 3.1, Eqs. 1-3).

An objective knows nothing of the network's conditions. It calls `net(x, timestep)`, which maps scaled noisy latents
(B, F, c, h, w) and timesteps (B,) to the raw output (B, F, c, h, w); text, first frame and guidance are bound inside.
Formulas and names follow diffusers' EulerDiscreteScheduler and DDIMScheduler, and DiT's GaussianDiffusion.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError

Net = Callable[[Tensor, Tensor], Tensor]


class Objective(ABC):
    """A training loss and the deterministic sampler that belongs to it.

    A noise level is one number: sigma for EDM, the timestep for DDPM. Subclasses define what it means; the loop over a
    schedule, from pure noise to clean latents, is the same for all.
    """

    @abstractmethod
    def training_loss(self, net: Net, x_start: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B, F, c, h, w) -> loss (). Each sample has one noise level, which its frames share."""

    @abstractmethod
    def noise_levels(self, steps: int) -> list[float]:
        """The noise levels at which a sampler of `steps` steps calls the network, the noisiest first."""

    @abstractmethod
    def scale_initial_noise(self, noise: Tensor) -> Tensor:
        """Unit Gaussian noise -> the state at the noisiest level (diffusers: times init_noise_sigma)."""

    @abstractmethod
    def network_input(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """The state at a noise level -> the arguments of the network: (x, timestep) of (B, F, c, h, w) and (B,)."""

    @abstractmethod
    def predict_x_start(self, out: Tensor, x: Tensor, level: float) -> Tensor:
        """The network's raw output for the state x at a noise level -> its prediction of the clean latents."""

    @abstractmethod
    def step(self, x: Tensor, x_start: Tensor, level: float, next_level: float) -> Tensor:
        """The state at `next_level`, from the state at `level` and the prediction of the clean latents there."""

    def network_input_after(
        self, net: Net, noise: Tensor, *, schedule_steps: int, num_steps: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The arguments (x, timestep) of the network's next call, once `num_steps` steps of a schedule are done.

        `num_steps=0` needs no call of the network: this is the input of the single denoising step whose features the
        policy reads (Sec. 3.1). Raises UserError if the schedule has no step left.
        """
        levels = self.noise_levels(schedule_steps)
        if not 0 <= num_steps < len(levels):
            raise UserError(
                f"denoise_steps={num_steps + 1} needs a schedule of at least as many steps, but schedule_steps is "
                f"{len(levels)}; raise schedule_steps or lower denoise_steps"
            )
        x = self.scale_initial_noise(noise)
        for level, next_level in zip(levels[:num_steps], levels[1:]):
            x = self.step(x, self._denoise(net, x, level), level, next_level)
        return self.network_input(x, levels[num_steps])

    def sample(self, net: Net, noise: Tensor, *, steps: int) -> Tensor:
        """Unit Gaussian noise (B, F, c, h, w) -> clean latents of the same shape, after `steps` network calls."""
        levels = self.noise_levels(steps)
        x = self.scale_initial_noise(noise)
        for level, next_level in zip(levels, levels[1:]):
            x = self.step(x, self._denoise(net, x, level), level, next_level)
        # the last step would go to noise level zero, where a deterministic sampler returns the prediction itself
        return self._denoise(net, x, levels[-1])

    def _denoise(self, net: Net, x: Tensor, level: float) -> Tensor:
        return self.predict_x_start(net(*self.network_input(x, level)).to(x.dtype), x, level)


class EDM(Objective):
    """Karras et al. (2022) as SVD uses it: sigma_data = 1, v-prediction, Euler steps on Karras' sigmas.

    Training draws log(sigma) from N(p_mean, p_std^2). Sampling goes from sigma_max to sigma_min, spaced by rho.
    """

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
        """sigma of any shape -> (c_skip, c_out, c_in, c_noise), each of that shape."""
        total_std = (sigma**2 + 1).sqrt()
        return 1 / total_std**2, -sigma / total_std, 1 / total_std, sigma.log() / 4

    def training_loss(self, net: Net, x_start: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See Objective. The squared error of the clean latents, weighted by 1 / c_out^2."""
        log_sigma = torch.randn(len(x_start), generator=generator, device=x_start.device)
        sigma = (self.p_mean + self.p_std * log_sigma).exp().view(-1, 1, 1, 1, 1)  # (B, 1, 1, 1, 1)
        noise = torch.randn(x_start.shape, generator=generator, device=x_start.device, dtype=x_start.dtype)
        x = x_start + sigma * noise  # (B, F, c, h, w)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        pred_x_start = c_out * net(c_in * x, c_noise.flatten()) + c_skip * x  # (B, F, c, h, w)
        weight = (sigma**2 + 1) / sigma**2
        return (weight * (pred_x_start.float() - x_start.float()) ** 2).mean()

    def noise_levels(self, steps: int) -> list[float]:
        """See Objective. The levels are sigmas."""
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((high + ramp * (low - high)) ** self.rho).tolist()

    def scale_initial_noise(self, noise: Tensor) -> Tensor:
        """See Objective."""
        # SVD's scheduler starts at sqrt(sigma^2 + 1), so that the network's first input is exactly unit Gaussian
        return noise * math.sqrt(self.sigma_max**2 + 1)

    def network_input(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """See Objective: (c_in x, c_noise)."""
        return x / math.sqrt(level**2 + 1), x.new_full((len(x),), math.log(level) / 4, dtype=torch.float32)

    def predict_x_start(self, out: Tensor, x: Tensor, level: float) -> Tensor:
        """See Objective: c_skip x + c_out out."""
        return x / (level**2 + 1) - out * (level / math.sqrt(level**2 + 1))

    def step(self, x: Tensor, x_start: Tensor, level: float, next_level: float) -> Tensor:
        """See Objective. An Euler step along (x - x_start) / sigma."""
        return x + (x - x_start) * ((next_level - level) / level)


class DDPM(Objective):
    """Eqs. 1-3: a variance schedule beta_1..beta_S, a network that predicts the noise or v, and DDIM as the sampler.

    prediction_type: "epsilon" (Eq. 3) or "v_prediction". beta_schedule: "linear", or "scaled_linear", which is linear
    in sqrt(beta) as in Stable Diffusion; the paper names none. Raises UserError for other values.
    """

    def __init__(
        self,
        *,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction_type is 'epsilon' or 'v_prediction', not {prediction_type!r}")
        if beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        elif beta_schedule == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
        else:
            raise UserError(f"beta_schedule is 'linear' or 'scaled_linear', not {beta_schedule!r}")
        self.prediction_type, self.num_train_timesteps = prediction_type, num_train_timesteps
        self.alphas_cumprod = (1 - betas).cumprod(0)  # (S,)

    def training_loss(self, net: Net, x_start: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See Objective. The squared error of the noise (Eq. 3) or of v."""
        timestep = torch.randint(
            0, self.num_train_timesteps, (len(x_start),), generator=generator, device=x_start.device
        )
        noise = torch.randn(x_start.shape, generator=generator, device=x_start.device, dtype=x_start.dtype)
        alphas_cumprod = self.alphas_cumprod.to(x_start.device)[timestep].view(-1, 1, 1, 1, 1)  # (B, 1, 1, 1, 1)
        signal_rate, noise_rate = alphas_cumprod.sqrt().to(x_start.dtype), (1 - alphas_cumprod).sqrt().to(x_start.dtype)
        out = net(signal_rate * x_start + noise_rate * noise, timestep.float())  # (B, F, c, h, w)
        target = noise if self.prediction_type == "epsilon" else signal_rate * noise - noise_rate * x_start
        return ((out.float() - target.float()) ** 2).mean()

    def noise_levels(self, steps: int) -> list[float]:
        """See Objective. The levels are timesteps with trailing spacing: the first is the noisiest of training."""
        if not 1 <= steps <= self.num_train_timesteps:
            raise UserError(
                f"{steps} sampling steps are not between 1 and the {self.num_train_timesteps} timesteps of the training"
            )
        return [round(self.num_train_timesteps - i * self.num_train_timesteps / steps) - 1.0 for i in range(steps)]

    def scale_initial_noise(self, noise: Tensor) -> Tensor:
        """See Objective."""
        return noise

    def network_input(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """See Objective."""
        return x, x.new_full((len(x),), level, dtype=torch.float32)

    def predict_x_start(self, out: Tensor, x: Tensor, level: float) -> Tensor:
        """See Objective."""
        signal_rate, noise_rate = self._signal_and_noise_rates(level)
        if self.prediction_type == "epsilon":
            return (x - noise_rate * out) / signal_rate
        return signal_rate * x - noise_rate * out

    def step(self, x: Tensor, x_start: Tensor, level: float, next_level: float) -> Tensor:
        """See Objective. A DDIM step with eta = 0."""
        signal_rate, noise_rate = self._signal_and_noise_rates(level)
        pred_epsilon = (x - signal_rate * x_start) / noise_rate
        next_signal_rate, next_noise_rate = self._signal_and_noise_rates(next_level)
        return next_signal_rate * x_start + next_noise_rate * pred_epsilon

    def _signal_and_noise_rates(self, level: float) -> tuple[float, float]:
        alpha_cumprod = self.alphas_cumprod[int(level)].item()
        return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
