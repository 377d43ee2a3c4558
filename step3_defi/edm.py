"""EDM for actions: training noise, preconditioning and the ten-step sampler (Sec. 3.3; Karras et al., 2022).

The paper does not specify them; the constants are those of the released code and of VPP. N rows, A actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.errors import UserError

Network = Callable[[Tensor, Tensor], Tensor]  # (scaled noisy actions (N, A, 7), sigma (N,)) -> (N, A, 7)


class ActionEDM:
    """Training noise, preconditioning and sampler; `sigma_data` is the standard deviation of the actions.

    log_location, log_scale: of the log-logistic distribution of training noise levels. noise_draws: noise levels per
    sample and training step, which share one context. num_inference_steps: of the sampler. sample_sigma_min: the last
    noise level of the sampler before zero, sigma_min when None. temperature: factor on the noise that sampling starts
    from; at 0, sampling starts from zero and does not depend on the seed.
    """

    def __init__(
        self,
        *,
        sigma_data: float = 0.5,
        sigma_min: float = 0.001,
        sigma_max: float = 80.0,
        log_location: float = math.log(0.5),
        log_scale: float = 0.5,
        noise_draws: int = 1,
        num_inference_steps: int = 10,
        sample_sigma_min: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        if temperature < 0:
            raise UserError(f"policy.edm.temperature={temperature}: it scales noise, so choose 0 or more")
        if noise_draws < 1 or num_inference_steps < 1:
            raise UserError(
                f"policy.edm.noise_draws={noise_draws}, policy.edm.num_inference_steps={num_inference_steps}: choose 1 "
                "or more"
            )
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.log_location, self.log_scale, self.noise_draws = log_location, log_scale, noise_draws
        self.num_inference_steps, self.temperature = num_inference_steps, temperature
        self.sample_sigma_min = sigma_min if sample_sigma_min is None else sample_sigma_min

    def sample_noise_levels(
        self, count: int, device: torch.device | str = "cpu", *, generator: torch.Generator | None = None
    ) -> Tensor:
        """(count,) noise levels from the log-logistic distribution, truncated to [sigma_min, sigma_max]."""
        low, high = (
            1 / (1 + math.exp(-(math.log(sigma) - self.log_location) / self.log_scale))
            for sigma in (self.sigma_min, self.sigma_max)
        )
        quantile = low + (high - low) * torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        sigma = (torch.logit(quantile) * self.log_scale + self.log_location).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max).float()

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) -> c_skip, c_out, c_in, each (N, 1, 1)."""
        sigma = sigma.view(-1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt()

    def denoise(self, network: Network, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Noisy actions (N, A, 7) and their noise levels (N,) -> the network's estimate of the clean actions."""
        c_skip, c_out, c_in = self.scalings(sigma)
        return c_skip * noisy + c_out * network(c_in * noisy, sigma).float()

    def squared_errors(self, network: Network, actions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Squared errors (N, A, 7) of the network's output for actions (N, A, 7), whose mean is the loss.

        Each row gets its own noise and its own noise level.
        """
        actions = actions.float()
        sigma = self.sample_noise_levels(len(actions), actions.device, generator=generator)
        noise = torch.randn(actions.shape, generator=generator, device=actions.device)
        noisy = actions + sigma.view(-1, 1, 1) * noise
        c_skip, c_out, c_in = self.scalings(sigma)
        target = (actions - c_skip * noisy) / c_out
        return (network(c_in * noisy, sigma).float() - target).square()

    def get_sigmas(self) -> Tensor:
        """(num_inference_steps + 1,) noise levels of the sampler: falling exponentially, then zero."""
        first, last = math.log(self.sigma_max), math.log(self.sample_sigma_min)
        sigmas = torch.linspace(first, last, self.num_inference_steps, dtype=torch.float64).exp()
        return torch.cat([sigmas, sigmas.new_zeros(1)]).float()

    def sample(self, network: Network, noise: Tensor) -> Tensor:
        """Unit noise (N, A, 7) -> actions (N, A, 7), with DDIM, which is the first-order DPM solver."""
        sigmas = self.get_sigmas().to(noise.device)
        x = noise * (self.temperature * sigmas[0])
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            denoised = self.denoise(network, x, sigma.expand(len(x)))
            x = denoised + sigma_next / sigma * (x - denoised)
        return x


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(len(seeds), *shape) unit noise. A row depends on its own seed only, and not on the device."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(device)
