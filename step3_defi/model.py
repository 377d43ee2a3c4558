"""DeFI: frozen foresight, inverse dynamics and action adapter as one policy (Sec. 3.3-3.4, Tables 1, 4, 6-9).

B batch, V views, F imagined frames, L feature tokens, N visual tokens, P frame pairs, K latent-action tokens, A
actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.contracts import FutureDynamics, InverseDynamics, LatentAction, PolicyBatch
from common.frozen import CLIPTextEncoder, FrozenModule
from common.metrics import code_counts, perplexity
from common.precision import bf16_pays
from common.standardize import RunningNorm
from step3_defi import reliance
from step3_defi.edm import ActionEDM, seeded_noise
from step3_defi.projector import pool_token_grid

PARTS = ("gfdm", "gidm", "projector", "video_former", "adapter")
STREAMS = ("video", "latent", "future", "now")
CODEBOOKS = ("frozen", "learned")
FLOOR = 1e-3  # variance added to that of a stream's numbers: one that hardly varies is not made as loud as the others


class DeFI(nn.Module):
    """The coupled policy. `projector`, `video_former` and `adapter` are constructors that get the widths of the
    parents.

    Cameras and frames: `views` names the cameras. `pair_frames` are the imagined frames that are each paired with the
    present
    one (at stride 2 of 30 Hz, frame 15 is the second that the inverse model was pretrained on), in each of
    `pair_views`, or in
    all views.

    What the adapter reads: `streams` names them. "video" is the video former's reading of all imagined frames, "latent"
    the
    lifted latent actions, "future" the projected frames of all views, averaged to `fuse_grid` tokens a side (Sec. 3.3),
    and
    "now" the present's visual tokens, which are not in the paper and let the adapter pass by both models. `standardize`
    brings
    every channel of the forward model's features and of the sentence, and every number of each stream, to mean 0 and
    deviation 1
    over the training data (running statistics).

    What learns: `trainable` names the parts (Table 9). `codebook` is "frozen", where latent actions keep the codes that
    pretraining made, or "learned". `restart_codes` lets unused codes move during finetuning, as during pretraining.
    `bottleneck_weight` is the weight of the inverse model's bottleneck loss. `alignment_weight` is the weight of the
    loss that
    teaches the projector the inverse model's visual tokens of the true future; for the first `alignment_steps`
    optimizer steps
    it is the only loss. `noise_draws` is the number of noise levels per sample and step, which share one context.

    `blind`: pictures are zero in training and in use (a baseline). `frozen_precision`: "bf16" or "fp32" of the parts
    that see
    pictures; "auto" is bf16 where the machine has it.
    """

    def __init__(
        self,
        gfdm: FutureDynamics,
        gidm: InverseDynamics,
        projector: Callable[..., nn.Module],
        video_former: Callable[..., nn.Module],
        adapter: Callable[..., nn.Module],
        goal: CLIPTextEncoder,
        *,
        edm: ActionEDM,
        views: Sequence[str],
        pair_frames: Sequence[int],
        trainable: Sequence[str],
        pair_views: Sequence[str] | None = None,
        image_size: int = 256,
        streams: Sequence[str] = ("video", "latent", "future"),
        fuse_grid: int = 4,
        standardize: bool = True,
        noise_draws: int = 1,
        codebook: str = "frozen",
        restart_codes: bool = False,
        bottleneck_weight: float = 1.0,
        alignment_weight: float = 0.0,
        alignment_steps: int = 0,
        blind: bool = False,
        imagine_seed: int = 0,
        frozen_precision: str = "auto",
    ) -> None:
        super().__init__()
        wrong = [index for index in pair_frames if not 0 <= index < gfdm.num_frames]
        if wrong or not pair_frames or not views or set(pair_views or ()) - set(views):
            raise ValueError(
                f"pair_frames {list(pair_frames)}, views {list(views)}, pair_views {list(pair_views or views)}: pairs "
                "are made of "
                f"views that are seen and of frames 0..{gfdm.num_frames - 1} that the forward model imagines"
            )
        if frozen_precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"frozen_precision={frozen_precision!r}: choose auto, bf16 or fp32")
        if not streams or set(streams) - set(STREAMS) or len(set(streams)) != len(streams):
            raise ValueError(f"streams {list(streams)}: name one or more of {list(STREAMS)}, each once")
        if codebook not in CODEBOOKS or restart_codes and codebook == "frozen":
            raise ValueError(
                f"codebook={codebook!r}, restart_codes={restart_codes}: choose frozen or learned; only learned codes "
                "can restart"
            )
        if alignment_steps and not alignment_weight:
            raise ValueError(
                f"alignment_steps={alignment_steps} at alignment_weight=0: these steps would learn nothing; set "
                "alignment_weight"
            )
        self.frozen_precision = frozen_precision
        self.views, self.pair_frames, self.image_size = tuple(views), tuple(pair_frames), image_size
        self.pair_view_indices = [self.views.index(name) for name in pair_views or self.views]
        self.fuse_grid, self.noise_draws = fuse_grid, noise_draws
        self.codebook, self.restart_codes, self.bottleneck_weight = codebook, restart_codes, bottleneck_weight
        self.alignment_weight, self.alignment_steps = alignment_weight, alignment_steps
        self.step = 0  # optimizer steps behind; the loop tells it
        self.blind, self.imagine_seed, self.edm, self.goal = blind, imagine_seed, edm, goal
        self.prepare_inverse_model(gidm)
        self.gfdm, self.gidm = gfdm, gidm
        self.feature_norm = RunningNorm(gfdm.feature_dim) if standardize else nn.Identity()
        self.goal_norm = RunningNorm(goal.pooled_dim, token_stride=1) if standardize else nn.Identity()
        self.projector = projector(gfdm.feature_dim, gidm.embed_dim)
        self.uses_present_tokens = self.projector.uses_present_tokens or "now" in streams
        self.video_former = video_former(gfdm.feature_dim, gfdm.num_frames, len(self.views), tokens=gfdm.num_tokens)
        pairs = len(self.pair_view_indices) * len(self.pair_frames)
        sizes = {
            "video": (self.video_former.num_tokens, self.video_former.dim),
            "latent": (pairs * gidm.num_action_tokens, gidm.embed_dim),
            "future": (len(self.views) * len(self.pair_frames) * fuse_grid**2, gidm.embed_dim),
            "now": (len(self.views) * fuse_grid**2, gidm.embed_dim),
        }
        if empty := [name for name in streams if not all(sizes[name])]:
            raise ValueError(
                f"streams {empty} have no tokens: latent needs an inverse model, future and now need one and a "
                "fuse_grid above 0"
            )
        self.streams = tuple(streams)
        self.stream_norms = nn.ModuleDict(
            {
                name: RunningNorm(sizes[name][0] * sizes[name][1], token_stride=1, eps=FLOOR)
                if standardize
                else nn.Identity()
                for name in streams
            }
        )
        self.adapter = adapter({name: sizes[name] for name in streams}, goal.pooled_dim)
        self.set_trainable(trainable)

    def prepare_inverse_model(self, gidm: InverseDynamics) -> None:
        """Prepare an inverse model for its place here: what only pretraining needs is dropped (A.3)."""
        gidm.drop_decoder()

    def set_trainable(self, names: Sequence[str]) -> None:
        """Let exactly the named parts learn. A frozen forward model also leaves the state dict."""
        unknown = sorted(set(names) - set(PARTS))
        if unknown:
            raise ValueError(f"no part is called {unknown}; trainable parts: {list(PARTS)}")
        self.trainable = tuple(name for name in PARTS if name in names)
        gfdm = self.forward_model
        self.gfdm = gfdm if "gfdm" in names else FrozenModule(gfdm)
        for name in PARTS:
            getattr(self, name).requires_grad_(name in names)
        if "gfdm" in names:
            gfdm.freeze_unused_blocks()
        if "gidm" in names and self.codebook == "frozen":
            self.gidm.freeze_codebook()
        self.train(self.training)

    def train(self, mode: bool = True) -> DeFI:
        """Frozen parts stay in eval mode."""
        super().train(mode)
        for name in PARTS:
            if name not in self.trainable:
                getattr(self, name).eval()
        return self

    def compile_parts(self, **options: Any) -> None:
        """torch.compile for what a plan spends its time in: the forward model's UNet, where it has one, and the
        adapter. Options are its own."""
        if hasattr(self.forward_model, "compile_unet"):
            self.forward_model.compile_unet(**options)
        self.adapter.compile(**options)

    @property
    def forward_model(self) -> nn.Module:
        """The GFDM, whether it learns or is kept out of torch's registry."""
        return self.gfdm.module if isinstance(self.gfdm, FrozenModule) else self.gfdm

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return next(self.adapter.parameters()).device

    def forward(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """The training loss: action denoising, the inverse model's bottleneck, and alignment where it is on.

        With alignment, `copy_loss` is what the present's tokens in place of the projected ones would cost. In eval
        mode,
        `swap_<stream>` and `mean_<stream>` say by what share the action loss rises when a stream is dealt to other
        samples of the
        batch, or replaced by its mean; for "gfdm", all that the forward model gives is replaced, ahead of the inverse
        model.
        `codes` (K, C) counts latent actions, for `metrics_from_counts`, where there are codes.
        """
        frozen = batch.get("frozen") or self.encode_observation(batch["views"], batch["text"], batch.get("futures"))
        goal, streams, extra = self.infer_streams(frozen, batch["text"])
        if self.training and self.alignment_steps and self.step < self.alignment_steps:
            # the other parts get a gradient of zero, since DDP waits for every parameter
            idle = sum(p.sum() for p in self.parameters() if p.requires_grad)
            loss = self.alignment_weight * extra["alignment_loss"] + 0.0 * idle
            return {"loss": loss, **{key: value.detach() for key, value in extra.items()}}
        actions = batch["actions"]
        if actions.shape[1:] != (self.adapter.horizon, self.adapter.action_dim):
            raise ValueError(
                f"actions of shape {tuple(actions.shape[1:])}; the adapter makes "
                f"{(self.adapter.horizon, self.adapter.action_dim)}"
            )
        action = self.action_squared_errors(goal, streams, actions).mean()
        if not self.training:
            extra |= {
                key: loss_increase["all"]
                for key, loss_increase in self._reliance(goal, streams, frozen, batch["text"], actions).items()
            }
            extra |= {f"spread_{name}": reliance.spread(tokens) for name, tokens in streams.items()}
        loss = (
            action
            + self.bottleneck_weight * extra["bottleneck_loss"]
            + self.alignment_weight * extra.get("alignment_loss", 0.0)
        )
        return {"loss": loss, "action_loss": action.detach(), **{key: value.detach() for key, value in extra.items()}}

    def metrics_from_counts(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """From the `codes` (K, C) of many batches: how many are in use, and their perplexity."""
        counted = counts["codes"].sum(0)
        return {"codes_used": float((counted > 0).sum()), "perplexity": float(perplexity(counted))}

    def action_squared_errors(
        self, goal: Tensor, streams: dict[str, Tensor], actions: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Squared errors (B * noise_draws, A, 7) of the preconditioned network; their mean is the action loss."""
        context = self.adapter.encode(goal, streams)
        drawn = actions.repeat_interleave(self.noise_draws, dim=0)
        return self.edm.squared_errors(lambda x, sigma: self.adapter(x, sigma, context), drawn, generator=generator)

    @torch.no_grad()
    def reliance(self, frozen: dict[str, Tensor], text: list[str], actions: Tensor) -> dict[str, dict[str, Tensor]]:
        """`swap_<stream>` and `mean_<stream>` -> shares of the action loss, see `reliance.shares`. Call it in eval
        mode."""
        goal, streams, _ = self.infer_streams(frozen, text)
        return self._reliance(goal, streams, frozen, text, actions)

    def _reliance(
        self, goal: Tensor, streams: dict[str, Tensor], frozen: dict[str, Tensor], text: list[str], actions: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        def squared_errors(parts: dict[str, Tensor]) -> Tensor:
            return self.action_squared_errors(goal, parts, actions, torch.Generator(actions.device).manual_seed(0))

        own = squared_errors(streams)
        changed = {
            f"{how}_{name}": {**streams, name: change(streams[name])}
            for how, change in reliance.ABLATIONS.items()
            for name in streams
        }
        changed |= {
            f"{how}_gfdm": self.infer_streams({**frozen, "features": change(frozen["features"])}, text)[1]
            for how, change in reliance.ABLATIONS.items()
        }
        return {name: reliance.loss_increase(squared_errors(parts), own) for name, parts in changed.items()}

    def on_train_begin(self, step: int) -> None:
        """Before the first step of a run, or of its rest: alignment that was over stays over."""
        self.step = step

    def on_step_end(self, step: int, accelerator: Any = None) -> dict[str, float]:
        """After an optimizer step: codes restart where that is asked for, and alignment ends after its steps."""
        self.step = step
        return self.gidm.on_step_end(step, accelerator) if self.restart_codes and "gidm" in self.trainable else {}

    @torch.no_grad()
    def sample(self, views: dict[str, Tensor], text: list[str], *, seed: int | Sequence[int] = 0) -> Tensor:
        """View name -> (B, 3, H, W) in [-1, 1], B strings -> actions (B, A, 7). A row depends on its own seed only."""
        seeds = [seed] * len(text) if isinstance(seed, int) else list(seed)
        goal, streams, _ = self.infer_streams(self.encode_observation(views, text, with_targets=False), text)
        context = self.adapter.encode(goal, streams)
        noise = seeded_noise(seeds, (self.adapter.horizon, self.adapter.action_dim), goal.device)
        return self.edm.sample(lambda x, sigma: self.adapter(x, sigma, context), noise)

    @torch.no_grad()
    def precompute(
        self, views: dict[str, Tensor], text: list[str], futures: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What the frozen parts say, in fp16, to be handed back as PolicyBatch["frozen"].

        features (B, V, F, L, C), where the present is real now (B, V, N, E), and with alignment target (B, V, P, N, E).
        """
        if "gfdm" in self.trainable:
            raise ValueError(
                "the forward model is trained, so its features change and cannot be precomputed; set cache=false"
            )
        seen = {name: tensor.half() for name, tensor in self.encode_observation(views, text, futures).items()}
        for name, tensor in seen.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} leaves the range of fp16 and cannot be cached; set cache=false")
        return seen

    def encode_observation(
        self,
        views: dict[str, Tensor],
        text: list[str],
        futures: dict[str, Tensor] | None = None,
        *,
        with_targets: bool = True,
    ) -> dict[str, Tensor]:
        """Run the parts that see pictures, all views in one pass. In use nothing is `taught`, and no future is
        known."""
        missing = [name for name in self.views if name not in views]
        if missing:
            raise ValueError(f"the policy looks through {list(self.views)}; the batch lacks {missing}")
        images = torch.cat([views[name] for name in self.views])  # (V*B, 3, H, W)
        count = len(self.views)
        if self.blind:
            images = torch.zeros_like(images)
        low = self.frozen_precision == "bf16" or self.frozen_precision == "auto" and bf16_pays(images.device)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low):
            seen = {"features": _by_view(self._imagine(images, list(text) * count), count)}
            if self.uses_present_tokens:
                seen["now"] = _by_view(self.gidm.embed((images + 1) / 2), count)
        if self.alignment_weight and with_targets:
            if futures is None:
                raise ValueError(
                    "alignment_weight needs the true future frames; set data.load_future_frames=true "
                    "data.future_frames=${policy.pair_frames}"
                )
            seen["target"] = self.encode_target_frames(futures)
        return seen

    def encode_target_frames(self, futures: dict[str, Tensor]) -> Tensor:
        """True frames of each view (B, P, 3, H, W) in [-1, 1], at `pair_frames` -> their visual tokens (B, V, P, N,
        E)."""
        wrong = {name: frames.shape[1] for name, frames in futures.items() if frames.shape[1] != len(self.pair_frames)}
        if wrong:
            raise ValueError(
                f"true frames of each view {wrong}, pair_frames {list(self.pair_frames)}: set "
                f"data.future_frames=${{policy.pair_frames}}"
            )
        frames = torch.stack(
            [futures[self.views[view]] for view in self.pair_view_indices], dim=1
        )  # (B, V, P, 3, H, W)
        return self.gidm.embed((frames.flatten(0, 2) + 1) / 2).unflatten(0, frames.shape[:3])

    def _imagine(self, images: Tensor, text: list[str]) -> Tensor:
        if "gfdm" in self.trainable:
            return self.gfdm.imagine(images, text, seed=self.imagine_seed)
        with torch.no_grad():
            return self.forward_model.imagine(images, text, seed=self.imagine_seed)

    def project_pairs(
        self, frozen: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """What was seen -> the present's tokens (B, V, N, E) where they are real, the standardised features (B, V, F,
        L, C), and the two moments
        of every pair: the present (B, V, 1, N, E) of `pair_views` and the projected futures (B, V, P, N, E) of all
        views."""
        now = frozen["now"].to(self.device, dtype) if self.uses_present_tokens else None
        features = self.feature_norm(frozen["features"].to(self.device)).to(
            dtype
        )  # standardised before they are rounded
        present, seen = self.projector.project_pairs(features, self.pair_frames, self.gidm.num_tokens, now)
        return now, features, present[:, self.pair_view_indices], seen

    def infer(self, present: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        """Present (B, V, 1, N, E), futures (B, V, P, N, E), B sentences -> the latent actions of all B*V*P pairs."""
        repeats = future.shape[1] * future.shape[2]
        return self.gidm.infer(
            present.expand_as(future).flatten(0, 2),
            future.flatten(0, 2),
            [sentence for sentence in text for _ in range(repeats)],
        )

    def infer_streams(
        self, frozen: dict[str, Tensor], text: list[str]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """From what was seen to the adapter's streams, and the losses and metrics met on the way."""
        device = self.device
        dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else next(self.adapter.parameters()).dtype
        )
        now, features, present, seen = self.project_pairs(frozen, dtype)
        future = seen[:, self.pair_view_indices]
        latent = self.infer(present, future, text)
        tokens = {
            "video": lambda: self.video_former(features),
            "latent": lambda: (
                self.gidm.embed_action(latent.quantized).unflatten(0, (len(text), -1)).flatten(1, 2)
            ),  # (B, V*P*K, E)
            "future": lambda: pool_token_grid(seen, self.fuse_grid).flatten(1, 3),
            "now": lambda: pool_token_grid(now, self.fuse_grid).flatten(1, 2),
        }
        found = {name: tokens[name]() for name in self.streams}
        streams = {name: self.stream_norms[name](stream.flatten(1)).view_as(stream) for name, stream in found.items()}
        extra = {"bottleneck_loss": latent.loss}
        if latent.codes is not None:
            extra["codes"] = code_counts(latent.codes, self.gidm.num_codes)
        if "target" in frozen:
            target = frozen["target"].to(future.device).float()
            extra["alignment_loss"] = (future.float() - target).square().mean()
            extra["copy_loss"] = (present.float() - target).square().mean()
        if "latent" in found:
            extra["latent_deviation"] = reliance.deviation(found["latent"])
        return self.goal_norm(self.goal.pooled(text).to(device)), streams, extra


def _by_view(stacked: Tensor, views: int) -> Tensor:
    """(V*B, ...) -> (B, V, ...)."""
    return stacked.unflatten(0, (views, -1)).transpose(0, 1)
