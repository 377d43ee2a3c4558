"""EDM for actions: how motions are noised, what the network learns and how ten steps undo it (Sec. 3.3; Karras et al.,
2022).

The paper is silent here; constants are those of the released code and VPP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]  # (scaled noisy actions (N, A, 7), sigma (N,)) -> (N, A, 7)


class ActionEDM:
    """Preconditioning, training noise and sampler. `sigma_data` is the spread of the actions.

    `temperature` scales the noise that sampling starts from: at 0 the sampler walks from the mean, and its result is
    the same
    for every seed.
    """

    def __init__(
        self,
        *,
        sigma_data: float = 0.5,
        sigma_min: float = 0.001,
        sigma_max: float = 80.0,
        log_location: float = math.log(0.5),
        log_scale: float = 0.5,
        steps: int = 10,
        sample_sigma_min: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature}: it scales noise, so 0 or more")
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.log_location, self.log_scale, self.steps, self.temperature = log_location, log_scale, steps, temperature
        self.sample_sigma_min = sigma_min if sample_sigma_min is None else sample_sigma_min

    def sample_noise_levels(
        self, count: int, device: torch.device | str = "cpu", *, generator: torch.Generator | None = None
    ) -> Tensor:
        """(count,) noise levels from the log-logistic distribution, truncated to [sigma_min, sigma_max]."""
        low, high = (
            1 / (1 + math.exp(-(math.log(s) - self.log_location) / self.log_scale))
            for s in (self.sigma_min, self.sigma_max)
        )
        share = low + (high - low) * torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        return (
            (torch.logit(share) * self.log_scale + self.log_location)
            .exp()
            .clamp(self.sigma_min, self.sigma_max)
            .float()
        )

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) -> c_skip, c_out, c_in, each (N, 1, 1)."""
        sigma = sigma.view(-1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt()

    def denoise(self, network: Network, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Noisy actions (N, A, 7) -> the network's estimate of the clean ones."""
        c_skip, c_out, c_in = self.scalings(sigma)
        return c_skip * noisy + c_out * network(c_in * noisy, sigma).float()

    def loss(self, network: Network, actions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the preconditioned network output; (sigma, noise) drawn for each row."""
        return self.squared_errors(network, actions, generator=generator).mean()

    def squared_errors(self, network: Network, actions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The squared errors (N, A, 7) whose mean is the loss."""
        actions = actions.float()
        sigma = self.sample_noise_levels(len(actions), actions.device, generator=generator)
        noisy = actions + sigma.view(-1, 1, 1) * torch.randn(actions.shape, generator=generator, device=actions.device)
        c_skip, c_out, c_in = self.scalings(sigma)
        target = (actions - c_skip * noisy) / c_out
        return (network(c_in * noisy, sigma).float() - target).square()

    def get_sigmas(self) -> Tensor:
        """(steps + 1,) exponentially falling noise levels, zero at the end."""
        levels = torch.linspace(
            math.log(self.sigma_max), math.log(self.sample_sigma_min), self.steps, dtype=torch.float64
        ).exp()
        return torch.cat([levels, levels.new_zeros(1)]).float()

    def sample(self, network: Network, noise: Tensor) -> Tensor:
        """DDIM (the first-order DPM solver) from unit noise (N, A, 7) to actions."""
        levels = self.get_sigmas().to(noise.device)
        x = noise * (self.temperature * levels[0])
        for now, sigma_next in zip(levels[:-1], levels[1:]):
            clean = self.denoise(network, x, now.expand(len(x)))
            x = clean + sigma_next / now * (x - clean)
        return x


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(len(seeds), *shape) unit noise; a row depends on its own seed only, on every device."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(device)
