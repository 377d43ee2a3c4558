"""DeFI: forward model, inverse model and action adapter coupled as one policy (Sec. 3.3-3.4, Tables 1, 4, 6-9).

B batch, V views, F imagined frames, L feature tokens, C their width, N visual tokens, E their width, V' views and P
frames that are paired, K latent-action tokens of a pair, k noise draws of a sample, A actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from common.contracts import FutureDynamics, InverseDynamics, LatentAction, PolicyBatch, TrainableModel
from common.errors import UserError
from common.frozen import CLIPTextEncoder, FrozenModule
from common.image_range import denormalize
from common.metrics import code_counts, perplexity
from common.precision import bf16_pays
from common.standardize import RunningNorm
from step3_defi import reliance
from step3_defi.config import (
    PARTS,
    AlignmentConfig,
    BottleneckConfig,
    ObservationConfig,
    PairingConfig,
    StreamsConfig,
    trainable_parts,
)
from step3_defi.edm import ActionEDM, seeded_noise
from step3_defi.projector import pool_token_grid

# Added to the variance of every number of a stream, so that one that hardly varies is not scaled up to the others.
STREAM_EPS = 1e-3


class EncodedObservation(NamedTuple):
    """What the parts that read pictures say about an observation.

    PolicyBatch["encoded"] holds the fields that are not None, by name.
    """

    features: Tensor  # (B, V, F, L, C), the forward model's features of all imagined frames
    present_tokens: Tensor | None = None  # (B, V, N, E), visual tokens of the observation, where the policy uses them
    target_tokens: Tensor | None = None  # (B, V', P, N, E), visual tokens of the true future, for alignment


class ProjectedPairs(NamedTuple):
    """The frames that the inverse model pairs, as visual tokens."""

    present: Tensor  # (B, V', 1, N, E), of the views that are paired
    futures: Tensor  # (B, V, P, N, E), projected imagined frames, of all views
    features: Tensor  # (B, V, F, L, C), the standardized features of all imagined frames
    present_tokens: Tensor | None  # (B, V, N, E), as in EncodedObservation


class InferredStreams(NamedTuple):
    """What the action adapter reads, and what was measured while it was computed."""

    goal: Tensor  # (B, G), the feature of the sentence
    streams: dict[str, Tensor]  # name -> (B, number of tokens, width)
    losses: dict[str, Tensor]  # bottleneck_loss, and with target tokens alignment_loss
    metrics: dict[str, Tensor]  # codes (K, number of codes), latent_deviation, and with target tokens copy_loss


class DeFI(TrainableModel):
    """The coupled policy.

    `projector`, `video_former` and `adapter` are constructors: they are called with the widths of the two models.
    `goal` encodes the sentence. `trainable` names the parts that learn, or a row of Table 9 (config.TRAINABLE); the
    other settings are described in step3_defi.config. Raises UserError for settings that do not fit each other.
    """

    def __init__(
        self,
        gfdm: FutureDynamics,
        gidm: InverseDynamics,
        projector: Callable[..., nn.Module],
        video_former: Callable[..., nn.Module],
        adapter: Callable[..., nn.Module],
        goal: CLIPTextEncoder,
        edm: ActionEDM,
        *,
        observation: ObservationConfig,
        pairing: PairingConfig,
        streams: StreamsConfig,
        alignment: AlignmentConfig,
        bottleneck: BottleneckConfig,
        trainable: str | Sequence[str] = "gidm_adapter",
    ) -> None:
        super().__init__()
        _check_pairing(observation, pairing, gfdm.num_frames)
        self.observation, self.alignment, self.bottleneck = observation, alignment, bottleneck
        self.views, self.image_size = observation.views, observation.image_size
        self.imagine_seed = observation.imagine_seed
        self.pair_frames = pairing.frames
        self.pair_view_indices = [self.views.index(name) for name in pairing.views or self.views]
        self.fuse_grid = streams.fuse_grid
        self.step = 0  # optimizer steps that are done, as the training loop says
        self.edm, self.goal = edm, goal
        self.prepare_inverse_model(gidm)
        self.gfdm, self.gidm = gfdm, gidm

        def norm(width: int, **options: Any) -> nn.Module:
            return RunningNorm(width, **options) if streams.standardize else nn.Identity()

        self.feature_norm = norm(gfdm.feature_dim)
        self.goal_norm = norm(goal.pooled_dim, token_stride=1)
        self.projector = projector(gfdm.feature_dim, gidm.embed_dim)
        self.uses_present_tokens = self.projector.uses_present_tokens or "now" in streams.names
        self.video_former = video_former(gfdm.feature_dim, gfdm.num_frames, len(self.views), tokens=gfdm.num_tokens)
        sizes = self._stream_sizes(streams.names)
        self.streams = tuple(sizes)
        self.stream_norms = nn.ModuleDict(
            {name: norm(count * width, token_stride=1, eps=STREAM_EPS) for name, (count, width) in sizes.items()}
        )
        self.adapter = adapter(sizes, goal.pooled_dim)
        self.set_trainable(trainable)

    def _stream_sizes(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Name -> (number of tokens, width) of the streams that are named."""
        pairs, grid = len(self.pair_view_indices) * len(self.pair_frames), self.fuse_grid**2
        sizes = {
            "video": (self.video_former.num_tokens, self.video_former.dim),
            "latent": (pairs * self.gidm.num_action_tokens, self.gidm.embed_dim),
            "future": (len(self.views) * len(self.pair_frames) * grid, self.gidm.embed_dim),
            "now": (len(self.views) * grid, self.gidm.embed_dim),
        }
        if empty := [name for name in names if not all(sizes[name])]:
            raise UserError(
                f"policy.streams.names: {empty} have no tokens. latent needs an inverse model; future and now need an "
                "inverse model and policy.streams.fuse_grid above 0"
            )
        return {name: sizes[name] for name in names}

    def prepare_inverse_model(self, gidm: InverseDynamics) -> None:
        """Drop what only the pretraining of the inverse model needs (A.3)."""
        gidm.drop_decoder()

    def set_trainable(self, choice: str | Sequence[str]) -> None:
        """Let exactly the parts of `choice` learn. A forward model that does not learn leaves the state dict."""
        self.trainable = trainable_parts(choice)
        gfdm = self.forward_model
        self.gfdm = gfdm if "gfdm" in self.trainable else FrozenModule(gfdm)
        for name in PARTS:
            getattr(self, name).requires_grad_(name in self.trainable)
        if "gfdm" in self.trainable:
            gfdm.freeze_unused_blocks()
        if "gidm" in self.trainable and self.bottleneck.codebook == "frozen":
            self.gidm.freeze_codebook()
        self.train(self.training)

    def train(self, mode: bool = True) -> DeFI:
        """As nn.Module.train, but parts that do not learn stay in eval mode."""
        super().train(mode)
        for name in PARTS:
            if name not in self.trainable:
                getattr(self, name).eval()
        return self

    def compile_parts(self, **options: Any) -> None:
        """Apply torch.compile to what takes most of the time of a plan: the forward model's UNet and the adapter.

        `options` are those of torch.compile. A forward model without a UNet is not compiled.
        """
        self.forward_model.compile_unet(**options)
        self.adapter.compile(**options)

    @property
    def forward_model(self) -> nn.Module:
        """The GFDM. When it does not learn, `gfdm` is a FrozenModule around it."""
        return self.gfdm.module if isinstance(self.gfdm, FrozenModule) else self.gfdm

    @property
    def device(self) -> torch.device:
        """The device that the policy computes on."""
        return next(self.adapter.parameters()).device

    def forward(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """The training loss, and the metrics of the batch.

        "loss" is the action loss, plus the inverse model's bottleneck loss and the alignment loss times their weights;
        in the first `alignment.steps` steps it is the alignment loss alone. Metrics: the single losses; "copy_loss",
        the alignment loss of the present's tokens in place of the projected ones; "latent_deviation"; and "codes"
        (K, number of codes), which counts the latent actions for `metrics_from_counts`.

        In eval mode, "swap_<stream>" and "mean_<stream>" say by what share the action loss rises when the samples of
        the batch exchange a stream, or when its mean replaces it. For "gfdm", all features of the forward model are
        replaced, before the inverse model reads them. "spread_<stream>" is reliance.spread.
        """
        if "encoded" in batch:
            encoded = EncodedObservation(**batch["encoded"])
        else:
            encoded = self.encode_observation(batch["views"], batch["text"], batch.get("futures"))
        inferred = self.infer_streams(encoded, batch["text"])
        losses, metrics = inferred.losses, inferred.metrics
        if self.training and self.step < self.alignment.steps:
            # The other parts get a gradient of zero, because DDP waits for the gradient of every parameter.
            idle = sum(p.sum() for p in self.parameters() if p.requires_grad)
            loss = self.alignment.weight * losses["alignment_loss"] + 0.0 * idle
            return _detached(loss, losses, metrics)
        actions = batch["actions"]
        if actions.shape[1:] != (self.adapter.action_horizon, self.adapter.action_dim):
            raise UserError(
                f"actions of shape {tuple(actions.shape[1:])}, but the adapter makes actions of shape "
                f"{(self.adapter.action_horizon, self.adapter.action_dim)}; set policy.adapter accordingly"
            )
        action_loss = self.action_squared_errors(inferred.goal, inferred.streams, actions).mean()
        if not self.training:
            rises = self.reliance(inferred, encoded, batch["text"], actions)
            metrics = metrics | {name: rise["all"] for name, rise in rises.items()}
            metrics |= {f"spread_{name}": reliance.spread(tokens) for name, tokens in inferred.streams.items()}
        loss = (
            action_loss
            + self.bottleneck.weight * losses["bottleneck_loss"]
            + self.alignment.weight * losses.get("alignment_loss", 0.0)
        )
        return _detached(loss, {"action_loss": action_loss, **losses}, metrics)

    def metrics_from_counts(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """From the "codes" (K, number of codes) of many batches: how many codes are used, and their perplexity."""
        counted = counts["codes"].sum(0)
        return {"codes_used": float((counted > 0).sum()), "perplexity": float(perplexity(counted))}

    def action_squared_errors(
        self, goal: Tensor, streams: Mapping[str, Tensor], actions: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Squared errors (B*k, A, 7) of the network's output for actions (B, A, 7); their mean is the action loss."""
        context = self.adapter.encode(goal, streams)
        drawn = actions.repeat_interleave(self.edm.noise_draws, dim=0)  # (B*k, A, 7)
        return self.edm.squared_errors(lambda x, sigma: self.adapter(x, sigma, context), drawn, generator=generator)

    @torch.no_grad()
    def reliance(
        self, inferred: InferredStreams, encoded: EncodedObservation, text: list[str], actions: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        """The name of an ablation, such as swap_latent -> what reliance.loss_increase gives. Call it in eval mode.

        `inferred` is what infer_streams gave for `encoded` and `text`.
        """
        goal, streams = inferred.goal, inferred.streams

        def squared_errors(streams: Mapping[str, Tensor]) -> Tensor:
            generator = torch.Generator(actions.device).manual_seed(0)  # the same noise for every ablation
            return self.action_squared_errors(goal, streams, actions, generator)

        ablated = {}
        for ablation, change in reliance.ABLATIONS.items():
            for name in streams:
                ablated[f"{ablation}_{name}"] = {**streams, name: change(streams[name])}
            other = encoded._replace(features=change(encoded.features))
            ablated[f"{ablation}_gfdm"] = self.infer_streams(other, text).streams
        own = squared_errors(streams)
        return {name: reliance.loss_increase(squared_errors(changed), own) for name, changed in ablated.items()}

    def on_train_begin(self, step: int) -> None:
        """As TrainableModel.on_train_begin; the step says whether alignment is still the only loss."""
        self.step = step

    def on_step_end(self, step: int, accelerator: Any = None) -> dict[str, float]:
        """As TrainableModel.on_step_end; unused codes restart where the settings ask for it."""
        self.step = step
        if self.bottleneck.restart_codes and "gidm" in self.trainable:
            return self.gidm.on_step_end(step, accelerator)
        return {}

    @torch.no_grad()
    def sample(self, views: dict[str, Tensor], text: list[str], *, seed: int | Sequence[int] = 0) -> Tensor:
        """View name -> (B, 3, H, W) in [-1, 1], and B sentences -> actions (B, A, 7).

        `seed` is one number, or one for each row; a row of the result depends on its own seed only.
        """
        seeds = [seed] * len(text) if isinstance(seed, int) else list(seed)
        inferred = self.infer_streams(self.encode_observation(views, text, with_targets=False), text)
        context = self.adapter.encode(inferred.goal, inferred.streams)
        shape = (self.adapter.action_horizon, self.adapter.action_dim)
        noise = seeded_noise(seeds, shape, inferred.goal.device)
        return self.edm.sample(lambda x, sigma: self.adapter(x, sigma, context), noise)

    @torch.no_grad()
    def precompute(
        self, views: dict[str, Tensor], text: list[str], futures: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """encode_observation in fp16, as PolicyBatch["encoded"] takes it: field of EncodedObservation -> tensor."""
        if "gfdm" in self.trainable:
            raise UserError(
                "the forward model learns, so its features change and cannot be stored; set cache=false, or choose "
                "policy.trainable without gfdm"
            )
        encoded = self.encode_observation(views, text, futures)._asdict()
        stored = {name: tensor.half() for name, tensor in encoded.items() if tensor is not None}
        for name, tensor in stored.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} exceed the range of fp16 and cannot be stored; set cache=false")
        return stored

    def encode_observation(
        self,
        views: dict[str, Tensor],
        text: list[str],
        futures: dict[str, Tensor] | None = None,
        *,
        with_targets: bool = True,
    ) -> EncodedObservation:
        """Run the parts that read pictures, all views in one batch.

        views: name -> (B, 3, H, W) in [-1, 1]; futures: name -> (B, P, 3, H, W), the true frames at `pair_frames`.
        Alignment needs `futures`, unless `with_targets` is false, as when the policy acts.
        """
        if missing := [name for name in self.views if name not in views]:
            raise UserError(f"the batch lacks the views {missing}; the policy reads {list(self.views)}")
        images = torch.cat([views[name] for name in self.views])  # (V*B, 3, H, W)
        if self.observation.blind:
            images = torch.zeros_like(images)
        precision = self.observation.precision
        low = precision == "bf16" or precision == "auto" and bf16_pays(images.device)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low):
            features = self._imagine(images, list(text) * len(self.views))  # (V*B, F, L, C)
            present = self.gidm.embed(denormalize(images)) if self.uses_present_tokens else None  # (V*B, N, E)
        targets = None
        if self.alignment.weight and with_targets:
            if futures is None:
                raise UserError(
                    "policy.alignment.weight above 0 needs the true future frames; set data.load_future_frames=true "
                    "data.future_frames=${policy.pairing.frames}"
                )
            targets = self.encode_target_frames(futures)
        features = rearrange(features, "(v b) f l c -> b v f l c", v=len(self.views))
        present = None if present is None else rearrange(present, "(v b) n e -> b v n e", v=len(self.views))
        return EncodedObservation(features, present, targets)

    def encode_target_frames(self, futures: dict[str, Tensor]) -> Tensor:
        """View name -> true frames (B, P, 3, H, W) in [-1, 1] at `pair_frames` -> visual tokens (B, V', P, N, E)."""
        wrong = {name: frames.shape[1] for name, frames in futures.items() if frames.shape[1] != len(self.pair_frames)}
        if wrong:
            raise UserError(
                f"numbers of true frames by view {wrong}, but policy.pairing.frames={list(self.pair_frames)}; set "
                "data.future_frames=${policy.pairing.frames}"
            )
        frames = torch.stack([futures[self.views[index]] for index in self.pair_view_indices], dim=1)
        batch, views, pairs = frames.shape[:3]
        tokens = self.gidm.embed(denormalize(rearrange(frames, "b v p c h w -> (b v p) c h w")))
        return rearrange(tokens, "(b v p) n e -> b v p n e", b=batch, v=views, p=pairs)

    def _imagine(self, images: Tensor, text: list[str]) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] and B sentences -> features (B, F, L, C)."""
        if "gfdm" in self.trainable:
            return self.gfdm.imagine(images, text, seed=self.imagine_seed)
        with torch.no_grad():
            return self.forward_model.imagine(images, text, seed=self.imagine_seed)

    def project_pairs(self, encoded: EncodedObservation, dtype: torch.dtype = torch.float32) -> ProjectedPairs:
        """Standardize the features and project the imagined frames of every pair; `dtype` is that of the result."""
        present_tokens = encoded.present_tokens.to(self.device, dtype) if self.uses_present_tokens else None
        # Standardized before the cast: large offsets would lose the differences between samples in bf16.
        features = self.feature_norm(encoded.features.to(self.device)).to(dtype)
        present, futures = self.projector.project_pairs(
            features, self.pair_frames, self.gidm.num_tokens, present_tokens
        )
        return ProjectedPairs(present[:, self.pair_view_indices], futures, features, present_tokens)

    def infer(self, present: Tensor, futures: Tensor, text: list[str]) -> LatentAction:
        """present (B, V', 1, N, E), futures (B, V', P, N, E), B sentences -> latent actions of the B*V'*P pairs."""
        pairs = futures.shape[1] * futures.shape[2]
        return self.gidm.infer(
            rearrange(present.expand_as(futures), "b v p n e -> (b v p) n e"),
            rearrange(futures, "b v p n e -> (b v p) n e"),
            [sentence for sentence in text for _ in range(pairs)],
        )

    def embed_latent(self, latent: LatentAction, batch: int) -> Tensor:
        """Latent actions of the pairs of `batch` samples -> their tokens (B, V'*P*K, E)."""
        return rearrange(self.gidm.embed_action(latent.quantized), "(b vp) k e -> b (vp k) e", b=batch)

    def infer_streams(self, encoded: EncodedObservation, text: list[str]) -> InferredStreams:
        """From an encoded observation to what the action adapter reads."""
        device = self.device
        dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else next(self.adapter.parameters()).dtype
        )
        pairs = self.project_pairs(encoded, dtype)
        futures = pairs.futures[:, self.pair_view_indices]  # (B, V', P, N, E)
        latent = self.infer(pairs.present, futures, text)
        tokens: dict[str, Callable[[], Tensor]] = {
            "video": lambda: self.video_former(pairs.features),
            "latent": lambda: self.embed_latent(latent, len(text)),
            "future": lambda: rearrange(pool_token_grid(pairs.futures, self.fuse_grid), "b v p n e -> b (v p n) e"),
            "now": lambda: rearrange(pool_token_grid(pairs.present_tokens, self.fuse_grid), "b v n e -> b (v n) e"),
        }
        raw = {name: tokens[name]() for name in self.streams}
        streams = {name: self.stream_norms[name](stream.flatten(1)).view_as(stream) for name, stream in raw.items()}
        losses, metrics = {"bottleneck_loss": latent.loss}, {}
        if latent.codes is not None:
            metrics["codes"] = code_counts(latent.codes, self.gidm.num_codes)
        if encoded.target_tokens is not None:
            targets = encoded.target_tokens.to(futures.device).float()
            losses["alignment_loss"] = (futures.float() - targets).square().mean()
            metrics["copy_loss"] = (pairs.present.float() - targets).square().mean()
        if "latent" in raw:
            metrics["latent_deviation"] = reliance.deviation(raw["latent"])
        goal = self.goal_norm(self.goal.pooled(text).to(device))
        return InferredStreams(goal, streams, losses, metrics)


def _check_pairing(observation: ObservationConfig, pairing: PairingConfig, num_frames: int) -> None:
    if unknown := sorted(set(pairing.views or ()) - set(observation.views)):
        raise UserError(
            f"policy.pairing.views names {unknown}, which the policy does not see; policy.observation.views="
            f"{list(observation.views)}"
        )
    if wrong := [frame for frame in pairing.frames if not 0 <= frame < num_frames]:
        raise UserError(
            f"policy.pairing.frames names {wrong}; the forward model imagines the frames 0..{num_frames - 1}"
        )


def _detached(loss: Tensor, losses: dict[str, Tensor], metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a training step returns: the loss with its gradient, all other numbers without."""
    return {"loss": loss, **{name: value.detach() for name, value in {**losses, **metrics}.items()}}
