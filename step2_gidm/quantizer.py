"""Four bottlenecks between the inverse model and its decoder (Sec. 3.2, Table 8).

All of them follow the `Quantizer` protocol. The paper compares the four without defining them; each class states our
definition.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError
from common.metrics import code_counts
from common.standardize import RunningNorm

# B batch, K latent-action tokens, C codes, d width of a code

MAX_LOG_SCALE = 3  # bound on the absolute logarithm of a Gaussian's standard deviation


class QuantizerOutput(NamedTuple):
    """What a bottleneck makes of z."""

    quantized: Tensor  # (B, K, d), straight-through: gradients reach z
    loss: Tensor  # ()
    codes: Tensor | None  # (B, K) indices, None for a continuous bottleneck
    stats: dict[str, Tensor]  # the two parts of the loss for the log: codebook and commitment, each ()


class Quantizer(Protocol):
    """What the inverse model asks of its bottleneck."""

    dim: int  # d
    size: int | None  # C, None for a continuous bottleneck

    def __call__(self, z: Tensor) -> QuantizerOutput:
        """Latent actions z (B, K, d)."""

    def on_step_end(self, step: int) -> dict[str, float]:
        """Called by the training loop after optimizer step number `step`; returns metrics to log."""

    def freeze_codebook(self) -> None:
        """From now on the codes neither learn nor restart, and the loss is the commitment alone."""


class DelayedQuantizer(nn.Module):
    """A bottleneck that takes effect late: during the first `delay` batches of training the decoder reads z itself.

    During the delay only the codes adapt to z. When z is quantized from the start, it first learns what is easiest to
    tell apart, the camera and the scene, and the commitment loss keeps it there, because motion is a small difference
    within such a cluster. The number of batches is saved, so finetuning does not start the delay again. A frozen
    codebook has no delay.
    """

    def __init__(self, delay: int) -> None:
        super().__init__()
        self.delay, self.frozen = delay, False
        if delay:
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def freeze_codebook(self) -> None:
        """See Quantizer."""
        self.frozen = True
        self.requires_grad_(False)

    def quantization_weight(self) -> Tensor | float:
        """Count a batch of training; 0 during the delay, 1 after it.

        It is a tensor where batches are counted, so that no step waits for the device.
        """
        if not self.delay or self.frozen or not self.training:
            return 1.0
        self.batches += 1
        return (self.batches > self.delay).float()


class RestartableCodebook(DelayedQuantizer):
    """A codebook whose unused codes restart.

    Every `restart_every` steps, until step `restart_until` if there is one, the codes that were not used since the last
    restart move onto vectors of the latest batch. With `restart_every` 0 they never restart.
    """

    def __init__(self, codes: int, dim: int, restart_every: int, restart_until: int | None, delay: int) -> None:
        super().__init__(delay)
        self.dim, self.size, self.restart_every, self.restart_until = dim, codes, restart_every, restart_until
        # Summed over the ranks in on_step_end, and saved: a resumed run restarts the same codes as an unbroken one.
        self.register_buffer("counts", torch.zeros(codes, dtype=torch.long))
        self._new_counts: Tensor | None = None
        self._last_batch: Tensor | None = None

    def restart(self, dead: Tensor, vectors: Tensor, std: Tensor) -> None:
        """Move the codes with indices `dead` (M,) onto `vectors` (M, d); `std` (d,) is that of the vectors' batch."""
        raise NotImplementedError

    @torch.no_grad()
    def on_step_end(self, step: int) -> dict[str, float]:
        """Add up the use of the codes over the ranks; on schedule, restart unused codes, equally on all ranks."""
        if self._new_counts is None:
            return {}
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._new_counts)
        self.counts += self._new_counts
        self._new_counts = None
        stopped = self.restart_until is not None and step > self.restart_until
        if self.frozen or not self.restart_every or step % self.restart_every or stopped:
            return {}
        dead = (self.counts == 0).nonzero().flatten()
        self.counts.zero_()
        if len(dead):
            self.restart(dead, *self._replacements(len(dead), step))
        return {"restarted": float(len(dead))}

    def _count(self, codes: Tensor, z: Tensor) -> None:
        """In training, count the use of `codes` (B, K) and keep z (B, K, d) for restarts."""
        if self.training:
            counts = code_counts(codes, self.size).sum(0)
            self._new_counts = counts if self._new_counts is None else self._new_counts + counts
            self._last_batch = rearrange(z.detach(), "b k d -> (b k) d")

    def _replacements(self, count: int, step: int) -> tuple[Tensor, Tensor]:
        """`count` vectors (count, d) of rank 0's latest batch and the standard deviation (d,) of that batch.

        Each vector is slightly perturbed, so that two codes at the same vector separate. The draw depends on `step`
        only.
        """
        batch = self._last_batch  # (M, d)
        generator = torch.Generator().manual_seed(step)
        order = torch.cat([torch.randperm(len(batch), generator=generator) for _ in range(-(-count // len(batch)))])
        noise = torch.randn(count, self.dim, generator=generator).to(batch.device)
        vectors = batch[order[:count].to(batch.device)] + 0.01 * batch.std(correction=0) * noise
        drawn = torch.cat([vectors, batch.std(0, correction=0, keepdim=True)])  # (count + 1, d)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(drawn, src=0)
        return drawn[:-1], drawn[-1]


class VectorQuantizer(RestartableCodebook):
    """VQ-VAE (van den Oord et al., 2017): the nearest of `codes` learned vectors, straight-through.

    loss = ||sg(z) - c||^2 + beta ||z - sg(c)||^2, means over the elements, with the weights of UniVLA and the release.
    With frozen codes only beta ||z - sg(c)||^2 is left.

    `normalize_tokens` is the number K of latent-action tokens, or 0 for no normalization. With it, every element of
    every token is brought to mean 0 and standard deviation 1 before z is compared with the codes: over the batch in
    training, over the training data in use. There are two reasons. Without it the K tokens differ from each other by
    more than actions make them differ. And codes lie at the means of the vectors that they stand for, so a smaller z
    makes a smaller loss: in finetuning, where no reconstruction opposes it, latent actions shrank until they carried
    nothing. The gradient passes through the statistics of the batch, because otherwise nothing limits z itself and its
    mean drifted far past its standard deviation. The meaning of frozen codes depends on these statistics, so both
    freeze together.
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
        """z (B, K, d) -> the nearest codes."""
        tokens = z.shape[1]
        with torch.autocast(z.device.type, enabled=False):
            z = self.norm(rearrange(z.float(), "b k d -> b (k d)"))
            z = rearrange(z, "b (k d) -> b k d", k=tokens)
            distances = torch.cdist(rearrange(z.detach(), "b k d -> (b k) d"), self.codebook.detach().float())
            codes = rearrange(distances.argmin(1), "(b k) -> b k", k=tokens)
            chosen = self.codebook[codes].float()  # (B, K, d)
            codebook, commitment = F.mse_loss(chosen, z.detach()), F.mse_loss(z, chosen.detach())
            weight = self.quantization_weight()
            quantized = z + weight * (chosen - z).detach()  # (B, K, d)
        self._count(codes, z)
        stats = {"codebook": codebook.detach(), "commitment": commitment.detach()}
        loss = (0.0 if self.frozen else codebook) + weight * self.beta * commitment
        return QuantizerOutput(quantized, loss, codes, stats)

    def train(self, mode: bool = True) -> VectorQuantizer:
        """As in torch, but frozen statistics of the normalization stay frozen."""
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def freeze_codebook(self) -> None:
        """See Quantizer; the statistics of the normalization freeze with the codes."""
        super().freeze_codebook()
        self.norm.eval()

    def restart(self, dead: Tensor, vectors: Tensor, std: Tensor) -> None:
        """See RestartableCodebook."""
        self.codebook[dead] = vectors.to(self.codebook.dtype)


class GaussianMixture(RestartableCodebook):
    """Soft assignment to `codes` learned diagonal Gaussians: the posterior mean, straight-through (our definition).

    r_c = softmax(log pi_c + log N(z; mu_c, sigma_c)), quantized = sum_c r_c mu_c. The mixture is fitted by maximum
    likelihood of sg(z). As in VQ, `beta` times the squared distance to the posterior mean commits the encoder. In 128
    dimensions a component that is not the nearest has practically no responsibility and no gradient, so unused
    components restart as VQ's codes do, with the standard deviation of the batch.
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
        """z (B, K, d) -> posterior means; `codes` are the most likely components."""
        tokens = z.shape[1]
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            log_joint = self._log_joint(rearrange(z.detach(), "b k d -> (b k) d"))  # (B K, C)
            responsibilities = log_joint.detach().softmax(1)  # (B K, C)
            mean = rearrange(responsibilities @ self.means.detach(), "(b k) d -> b k d", k=tokens)
            fit = -log_joint.logsumexp(1).mean() / self.dim
            commitment = F.mse_loss(z, mean)
            weight = self.quantization_weight()
            quantized = z + weight * (mean - z).detach()  # (B, K, d)
        codes = rearrange(responsibilities.argmax(1), "(b k) -> b k", k=tokens)
        self._count(codes, z)
        stats = {"codebook": fit.detach(), "commitment": commitment.detach()}
        loss = (0.0 if self.frozen else fit) + weight * self.beta * commitment
        return QuantizerOutput(quantized, loss, codes, stats)

    def _log_joint(self, z: Tensor) -> Tensor:
        """z (M, d) -> (M, C) log pi_c + log N(z; mu_c, sigma_c), up to a constant.

        The squared distance is expanded into products, so that no (M, C, d) tensor is needed.
        """
        # Without the bound, a component that sits on a single point would gain likelihood without end.
        log_scales = self.log_scales.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)  # (C, d)
        precision = (-2 * log_scales).exp()  # (C, d)
        distance = (
            z.square() @ precision.T - 2 * z @ (self.means * precision).T + (self.means.square() * precision).sum(1)
        )  # (M, C)
        return self.logits.log_softmax(0) - log_scales.sum(1) - 0.5 * distance

    def restart(self, dead: Tensor, vectors: Tensor, std: Tensor) -> None:
        """See RestartableCodebook; a restarted component gets the mean weight of all components."""
        self.means[dead] = vectors
        self.log_scales[dead] = std.log().clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)  # outside, the gradient is zero
        self.logits[dead] = self.logits.mean()


class Binning(DelayedQuantizer):
    """Simple binning: the nearest of `bins` equidistant levels in each of `dim` elements, straight-through (our
    definition).

    Running statistics bring every element to mean 0 and standard deviation 1 over all tokens, and erf(x / sqrt 2) maps
    it into [-1, 1]. There a normally distributed element falls into all bins equally often, whereas a plain tanh puts
    most of a narrow one into the central bin. The levels are the centres of equal bins of [-1, 1]. There is no learned
    codebook and no loss. The joint index over the elements is the code: 5 bins x 3 elements are 125 codes, about as
    many as the 128 of VQ. `freeze_codebook` has no effect on the running statistics: they go on following z, so that
    the bins stay evenly used.

    Raises UserError where there are too many joint codes to number.
    """

    def __init__(self, bins: int, dim: int, delay: int = 0) -> None:
        super().__init__(delay)
        if bins**dim >= 2**62:
            raise UserError(f"binning into {bins} bins x {dim} numbers has no joint index; use fewer of either")
        self.bins, self.dim, self.size = bins, dim, bins**dim
        self.standardize = RunningNorm(dim, token_stride=1)
        self.register_buffer("radix", bins ** torch.arange(dim), persistent=False)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """z (B, K, d) -> the centres of its bins, in (-1, 1)."""
        uniform = (self.standardize(z.float()) * 0.5**0.5).erf()  # (B, K, d) in [-1, 1]
        index = ((uniform.detach() + 1) * self.bins / 2).long().clamp(0, self.bins - 1)  # (B, K, d)
        centres = (2 * index + 1) / self.bins - 1  # (B, K, d)
        codes = (index * self.radix).sum(-1)  # (B, K)
        quantized = uniform + self.quantization_weight() * (centres - uniform).detach()  # (B, K, d)
        stats = {"codebook": z.new_zeros(()), "commitment": z.new_zeros(())}
        return QuantizerOutput(quantized, z.new_zeros(()), codes, stats)

    def on_step_end(self, step: int) -> dict[str, float]:
        """See Quantizer. The levels are fixed, so there is nothing to restart."""
        return {}


class Continuous(nn.Module):
    """Continuous latent action: no bottleneck but the width, and no codes."""

    size = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, z: Tensor) -> QuantizerOutput:
        """z (B, K, d) -> z itself."""
        zero = z.new_zeros(())
        return QuantizerOutput(z, zero, None, {"codebook": zero, "commitment": zero})

    def on_step_end(self, step: int) -> dict[str, float]:
        """See Quantizer. There is nothing to restart."""
        return {}

    def freeze_codebook(self) -> None:
        """See Quantizer. There are no codes."""
