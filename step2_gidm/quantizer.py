"""Four bottlenecks between the inverse model and its decoder (Sec. 3.2, Table 8).

All share one protocol: `forward(z (B, K, dim)) -> QuantizerOutput` and `on_step_end(step)`, which the training loop calls after
every optimizer step. A `delay` lets the decoder read z itself at first. The paper compares the four without defining
them; each definition stands in its class.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.metrics import code_counts
from common.standardize import RunningNorm

# B batch, K latent-action tokens, C codes, d width of a code

LOG_SCALE = 3  # of a Gaussian's deviation, at most, either way


class QuantizerOutput(NamedTuple):
    """What a bottleneck makes of z."""

    quantized: Tensor  # (B, K, d), gradients reach z
    loss: Tensor  # ()
    codes: Tensor | None  # (B, K) indices, None where there are none
    stats: dict[str, Tensor]  # codebook and commitment


class Quantizer(Protocol):
    """What a model asks of its bottleneck."""

    dim: int
    size: int | None  # how many codes there are

    def __call__(self, z: Tensor) -> QuantizerOutput: ...

    def on_step_end(self, step: int) -> dict[str, float]: ...

    def freeze_codebook(self) -> None: ...


class DelayedQuantizer(nn.Module):
    """A bottleneck that takes over late: for the first `delay` batches of training the decoder reads z itself, to which
    only the table adapts.

    Quantized from the start, z first learns what is easiest to tell apart, the camera and the scene, and the commitment
    holds it there:
    motion is a small difference within such a cluster. Finetuning does not start over: the count is saved, and frozen
    codes wait for nothing.
    """

    def __init__(self, delay: int) -> None:
        super().__init__()
        self.delay, self.frozen = delay, False
        if delay:
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def freeze_codebook(self) -> None:
        """From now on the table neither learns nor restarts, and the loss is the commitment alone."""
        self.frozen = True
        self.requires_grad_(False)

    def share(self) -> Tensor | float:
        """0 as long as the bottleneck waits, else 1; a tensor where that has to be counted, so that no step waits for
        the device."""
        if not self.delay or self.frozen or not self.training:
            return 1.0
        self.batches += 1
        return (self.batches > self.delay).float()


class RestartableCodebook(DelayedQuantizer):
    """A table of `codes`. Those that nobody used for `restart_every` steps move onto vectors of the latest batch; 0
    never restarts."""

    def __init__(self, codes: int, dim: int, restart_every: int, restart_until: int | None, delay: int) -> None:
        super().__init__(delay)
        self.dim, self.size, self.restart_every, self.restart_until = dim, codes, restart_every, restart_until
        # summed over ranks in on_step_end, and saved: a resumed run restarts the codes that an unbroken one does
        self.register_buffer("counts", torch.zeros(codes, dtype=torch.long))
        self._recent: Tensor | None = None
        self._latest: Tensor | None = None

    def restart(self, dead: Tensor, vectors: Tensor, spread: Tensor) -> None:
        """Move the codes `dead` (M) onto `vectors` (M, d); `spread` (d) is the deviation of the batch that they come
        from."""
        raise NotImplementedError

    @torch.no_grad()
    def on_step_end(self, step: int) -> dict[str, float]:
        """Add up usage over the ranks; on the schedule, restart dead codes with the same vectors everywhere."""
        if self._recent is None:
            return {}
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._recent)
        self.counts += self._recent
        self._recent = None
        stopped = self.restart_until is not None and step > self.restart_until
        if self.frozen or not self.restart_every or step % self.restart_every or stopped:
            return {}
        dead = (self.counts == 0).nonzero().flatten()
        self.counts.zero_()
        if len(dead):
            self.restart(dead, *self._replacements(len(dead), step))
        return {"restarted": float(len(dead))}

    def _note(self, codes: Tensor, z: Tensor) -> None:
        if self.training:
            counts = code_counts(codes, self.size).sum(0)
            self._recent = counts if self._recent is None else self._recent + counts
            self._latest = z.detach().flatten(0, 1)

    def _replacements(self, count: int, step: int) -> tuple[Tensor, Tensor]:
        """`count` vectors of rank 0's latest batch, each a little off so that twins part, and its deviation; the draw
        depends on `step` only."""
        latest = self._latest
        generator = torch.Generator().manual_seed(step)
        order = torch.cat([torch.randperm(len(latest), generator=generator) for _ in range(-(-count // len(latest)))])
        noise = torch.randn(count, self.dim, generator=generator).to(latest.device)
        vectors = latest[order[:count].to(latest.device)] + 0.01 * latest.std(correction=0) * noise
        drawn = torch.cat([vectors, latest.std(0, correction=0, keepdim=True)])
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(drawn, src=0)
        return drawn[:-1], drawn[-1]


class VectorQuantizer(RestartableCodebook):
    """VQ-VAE (van den Oord et al., 2017): the nearest of `codes` learned vectors, straight-through.

    loss = ||sg(z) - c||^2 + beta ||z - sg(c)||^2, means over elements, weights of UniVLA and the release. Frozen codes
    leave
    beta ||z - sg(c)||^2.

    With `normalize`, the number K of latent-action tokens, every number of every token is brought to mean 0 and
    deviation 1 over the batch,
    and in use over the training data, before z is compared with the codes; otherwise the K tokens differ by more than
    actions make
    them differ. Codes sit at the means of what they stand for, so without it a smaller z makes a smaller loss: in
    finetuning, where no
    reconstruction holds against it, latent actions shrank until they said nothing. The gradient passes through the
    batch's statistics:
    when it did not, nothing held z itself, and its mean drifted far past its deviation. What frozen codes mean includes
    these statistics, so
    they freeze with them.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        restart_every: int = 20,
        restart_until: int | None = None,
        normalize_tokens: int = 0,
        delay: int = 0,
    ) -> None:
        super().__init__(codes, dim, restart_every, restart_until, delay)
        self.beta = beta
        self.norm = (
            nn.BatchNorm1d(normalize_tokens * dim, affine=False, momentum=0.02) if normalize_tokens else nn.Identity()
        )
        self.codebook = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """(B, K, dim) -> the nearest codes, with gradients copied to z."""
        with torch.autocast(z.device.type, enabled=False):
            z = self.norm(z.float().flatten(1)).view(z.shape)
            codes = torch.cdist(z.detach().flatten(0, 1), self.codebook.detach().float()).argmin(1).view(z.shape[:2])
            chosen = self.codebook[codes].float()
            codebook, commitment = F.mse_loss(chosen, z.detach()), F.mse_loss(z, chosen.detach())
            share = self.share()
            quantized = z + share * (chosen - z).detach()
        self._note(codes, z)
        stats = {"codebook": codebook.detach(), "commitment": commitment.detach()}
        loss = (0.0 if self.frozen else codebook) + share * self.beta * commitment
        return QuantizerOutput(quantized, loss, codes, stats)

    def train(self, mode: bool = True) -> VectorQuantizer:
        """Statistics that were frozen stay as they are."""
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def freeze_codebook(self) -> None:
        """See DelayedQuantizer; what brings z to the codes' scale freezes, too."""
        super().freeze_codebook()
        self.norm.eval()

    def restart(self, dead: Tensor, vectors: Tensor, spread: Tensor) -> None:
        """See RestartableCodebook."""
        self.codebook[dead] = vectors.to(self.codebook.dtype)


class GaussianMixture(RestartableCodebook):
    """Soft assignment to `codes` learned diagonal Gaussians: the posterior mean, straight-through (our definition).

    r_c = softmax(log pi_c + log N(z; mu_c, sigma_c)), quantized = sum_c r_c mu_c. The mixture is fitted by maximum
    likelihood of sg(z); `beta` times the distance to the posterior mean commits the encoder, as in VQ. In 128 numbers a
    component
    that is not the nearest gets no share and no gradient, so components restart as VQ's codes do, at the batch's
    deviation.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        restart_every: int = 20,
        restart_until: int | None = None,
        delay: int = 0,
    ) -> None:
        super().__init__(codes, dim, restart_every, restart_until, delay)
        self.beta = beta
        self.means = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))
        self.log_scales = nn.Parameter(torch.zeros(codes, dim))
        self.logits = nn.Parameter(torch.zeros(codes))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """(B, K, dim) -> posterior means; codes are the likeliest components."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            log_joint = self._log_joint(z.detach().flatten(0, 1))  # (B K, C)
            share = log_joint.detach().softmax(1)
            mean = (share @ self.means.detach()).view_as(z)
            fit = -log_joint.logsumexp(1).mean() / self.dim
            commitment = F.mse_loss(z, mean)
            reached = self.share()
            quantized = z + reached * (mean - z).detach()
        codes = share.argmax(1).view(z.shape[:2])
        self._note(codes, z)
        stats = {"codebook": fit.detach(), "commitment": commitment.detach()}
        loss = (0.0 if self.frozen else fit) + reached * self.beta * commitment
        return QuantizerOutput(quantized, loss, codes, stats)

    def _log_joint(self, z: Tensor) -> Tensor:
        """(M, d) -> (M, C) log pi_c + log N(z; mu_c, sigma_c), up to a constant; written as products to spare (M, C,
        d)."""
        log_scales = self.log_scales.clamp(
            -LOG_SCALE, LOG_SCALE
        )  # a component that sits on one point would win without bound
        precision = (-2 * log_scales).exp()
        distance = (
            z.square() @ precision.T - 2 * z @ (self.means * precision).T + (self.means.square() * precision).sum(1)
        )
        return self.logits.log_softmax(0) - log_scales.sum(1) - 0.5 * distance

    def restart(self, dead: Tensor, vectors: Tensor, spread: Tensor) -> None:
        """See RestartableCodebook; restarted components are as likely as the others are on average."""
        self.means[dead] = vectors
        self.log_scales[dead] = spread.log().clamp(-LOG_SCALE, LOG_SCALE)  # past them no gradient comes back
        self.logits[dead] = self.logits.mean()


class Binning(DelayedQuantizer):
    """Simple binning: the nearest of `bins` even levels in each of `dim` numbers, straight-through (our definition).

    Every number is brought to mean 0 and deviation 1 over all positions by running statistics, and by erf(x / sqrt 2)
    into [-1, 1]: there
    a normal number falls into all bins equally often, where a bare tanh puts most of a narrow one into the centre bin.
    No learned
    table and no loss. Levels are the centres of equal bins of [-1, 1]. The joint index over the numbers is the code: 5
    bins x 3 numbers
    are 125 codes, the information of a 128-code book. Frozen codes change nothing here: what is measured of z goes on
    following z, so that its
    bins stay in even use.
    """

    def __init__(self, bins: int, dim: int, delay: int = 0) -> None:
        super().__init__(delay)
        if bins**dim >= 2**62:
            raise ValueError(f"binning into {bins} bins x {dim} numbers has no joint index; use fewer of either")
        self.bins, self.dim, self.size = bins, dim, bins**dim
        self.standardize = RunningNorm(dim, token_stride=1)
        self.register_buffer("radix", bins ** torch.arange(dim), persistent=False)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """(B, K, dim) -> bin centres in (-1, 1)."""
        even = (self.standardize(z.float()) * 0.5**0.5).erf()
        index = ((even.detach() + 1) * self.bins / 2).long().clamp(0, self.bins - 1)
        centres = (2 * index + 1) / self.bins - 1
        codes = (index * self.radix).sum(-1)
        stats = {"codebook": z.new_zeros(()), "commitment": z.new_zeros(())}
        return QuantizerOutput(even + self.share() * (centres - even).detach(), z.new_zeros(()), codes, stats)

    def on_step_end(self, step: int) -> dict[str, float]:
        """Nothing to restart: levels are fixed."""
        return {}


class Continuous(nn.Module):
    """Continuous latent action: no bottleneck but the width, and no codes; so there is nothing that a `delay` could put
    off."""

    size = None

    def __init__(self, dim: int, delay: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, z: Tensor) -> QuantizerOutput:
        """(B, K, dim) -> z itself."""
        zero = z.new_zeros(())
        return QuantizerOutput(z, zero, None, {"codebook": zero, "commitment": zero})

    def on_step_end(self, step: int) -> dict[str, float]:
        """Nothing to restart."""
        return {}

    def freeze_codebook(self) -> None:
        """There are none."""
