"""DeFI: frozen foresight, inverse dynamics and action adapter as one policy (Sec. 3.3-3.4, Tables 1, 4, 6-9).

B batch, V views, F imagined frames, L feature tokens, N visual tokens, P frame pairs, K latent-action tokens, A actions.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.contracts import FutureDynamics, InverseDynamics, PolicyBatch
from common.frozen import ClipText, Frozen
from common.metrics import code_counts, perplexity
from common.precision import bf16_pays
from common.standardize import Standardize
from step3_defi.edm import EDM, seeded_noise
from step3_defi.projector import pool_grid

PARTS = ("gfdm", "gidm", "projector", "video_former", "adapter")


class DeFI(nn.Module):
    """The coupled policy. `projector`, `video_former` and `adapter` are constructors that get the widths of the parents.

    views: names of the cameras; pair_frames: imagined frames that are each paired with the present one (at stride 2 of
    30 Hz, frame 15 is the second that the inverse model was pretrained on), in each of `pair_views` (all). trainable: names
    of the parts that learn (Table 9). fuse_grid: the projected frames of all views reach the adapter averaged to so many
    tokens a side, 0 for none; with fuse_now the present's tokens do, too. standardize: bring every channel of the features and of
    the sentence to mean 0 and deviation 1 over the training data (running statistics). noise_draws: noise levels per sample and step, sharing
    one context. alignment_weight: how much the projector is taught to hit DINOv2's tokens of the true future. blind:
    pictures are zero in training and in use (a baseline). frozen_precision: "bf16" or "fp32" of the parts that see pictures;
    "auto" is bf16 where the machine has it.
    """

    def __init__(self, gfdm: FutureDynamics, gidm: InverseDynamics, projector: Callable[..., nn.Module],
                 video_former: Callable[..., nn.Module], adapter: Callable[..., nn.Module], goal: ClipText, *, edm: EDM,
                 views: Sequence[str], pair_frames: Sequence[int], trainable: Sequence[str], pair_views: Sequence[str] | None = None, image_size: int = 256,
                 fuse_grid: int = 4, fuse_now: bool = False, standardize: bool = True, noise_draws: int = 1, alignment_weight: float = 0.0, blind: bool = False,
                 imagine_seed: int = 0, frozen_precision: str = "auto") -> None:
        super().__init__()
        wrong = [index for index in pair_frames if not 0 <= index < gfdm.num_frames]
        if wrong or not pair_frames or not views or set(pair_views or ()) - set(views):
            raise ValueError(f"pair_frames {list(pair_frames)}, views {list(views)}, pair_views {list(pair_views or views)}: pairs are made of "
                             f"views that are seen and of frames 0..{gfdm.num_frames - 1} that the forward model imagines")
        if frozen_precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"frozen_precision={frozen_precision!r}: choose auto, bf16 or fp32")
        self.frozen_precision = frozen_precision
        self.views, self.pair_frames, self.image_size = tuple(views), tuple(pair_frames), image_size
        self.pairs_of = [self.views.index(name) for name in pair_views or self.views]
        self.fuse_grid, self.fuse_now, self.noise_draws, self.alignment_weight = fuse_grid, fuse_now, noise_draws, alignment_weight
        self.blind, self.imagine_seed, self.edm, self.goal = blind, imagine_seed, edm, goal
        self.adopt(gidm)
        self.gfdm, self.gidm = gfdm, gidm
        self.feature_norm = Standardize(gfdm.feature_dim) if standardize else nn.Identity()
        self.goal_norm = Standardize(goal.pooled_dim, sparing=1) if standardize else nn.Identity()
        self.projector = projector(gfdm.feature_dim, gidm.embed_dim)
        self.sees_now = self.projector.sees_now or bool(fuse_grid and fuse_now)
        self.video_former = video_former(gfdm.feature_dim, gfdm.num_frames, len(self.views), tokens=gfdm.num_tokens)
        pairs = len(self.pairs_of) * len(self.pair_frames)
        streams = {"video": (self.video_former.num_tokens, self.video_former.dim), "latent": (pairs * gidm.num_actions, gidm.embed_dim)}
        if fuse_grid:
            streams["future"] = (len(self.views) * len(self.pair_frames) * fuse_grid**2, gidm.embed_dim)
        if fuse_grid and fuse_now:
            streams["now"] = (len(self.views) * fuse_grid**2, gidm.embed_dim)
        self.adapter = adapter({name: size for name, size in streams.items() if size[0]}, goal.pooled_dim)
        self.set_trainable(trainable)

    def adopt(self, gidm: InverseDynamics) -> None:
        """Prepare an inverse model for its place here: what only pretraining needs is dropped (A.3)."""
        gidm.drop_decoder()

    def set_trainable(self, names: Sequence[str]) -> None:
        """Let exactly the named parts learn. A frozen forward model also leaves the state dict."""
        unknown = sorted(set(names) - set(PARTS))
        if unknown:
            raise ValueError(f"no part is called {unknown}; trainable parts: {list(PARTS)}")
        self.trainable = tuple(name for name in PARTS if name in names)
        gfdm = self.forward_model
        self.gfdm = gfdm if "gfdm" in names else Frozen(gfdm)
        for name in PARTS:
            getattr(self, name).requires_grad_(name in names)
        if "gfdm" in names:
            gfdm.freeze_untapped()
        self.train(self.training)

    def train(self, mode: bool = True) -> DeFI:
        """Frozen parts stay in eval mode."""
        super().train(mode)
        for name in PARTS:
            if name not in self.trainable:
                getattr(self, name).eval()
        return self

    def compile_parts(self, **options: Any) -> None:
        """torch.compile for what a plan spends its time in: the forward model's UNet, where it has one, and the adapter. Options are its own."""
        if hasattr(self.forward_model, "compile_unet"):
            self.forward_model.compile_unet(**options)
        self.adapter.compile(**options)

    @property
    def forward_model(self) -> nn.Module:
        """The GFDM, whether it learns or is kept out of torch's registry."""
        return self.gfdm.module if isinstance(self.gfdm, Frozen) else self.gfdm

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return next(self.adapter.parameters()).device

    def forward(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """The training loss: action denoising, the inverse model's bottleneck, and alignment where it is on.

        In eval mode `latent_gap` is how much the action loss rises when latent actions are dealt to other samples of the batch.
        `codes` (K, C) counts them, for `count_metrics`, where there are codes.
        """
        frozen = batch.get("frozen") or self._look(batch["views"], batch["text"], batch.get("futures"))
        goal, streams, extra = self._infer(frozen, batch["text"])
        actions = batch["actions"]
        if actions.shape[1:] != (self.adapter.horizon, self.adapter.action_dim):
            raise ValueError(f"actions of shape {tuple(actions.shape[1:])}; the adapter makes {(self.adapter.horizon, self.adapter.action_dim)}")
        action = self._action_loss(goal, streams, actions)
        if not self.training and "latent" in streams:
            extra["latent_gap"] = self._latent_gap(goal, streams, actions)
        loss = action + extra["bottleneck_loss"] + self.alignment_weight * extra.get("alignment_loss", 0.0)
        return {"loss": loss, "action_loss": action.detach(), **{key: value.detach() for key, value in extra.items()}}

    def count_metrics(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """From the `codes` (K, C) of many batches: how many are in use, and their perplexity."""
        counted = counts["codes"].sum(0)
        return {"codes_used": float((counted > 0).sum()), "perplexity": float(perplexity(counted))}

    def _action_loss(self, goal: Tensor, streams: dict[str, Tensor], actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        context = self.adapter.encode(goal, streams)
        drawn = actions.repeat_interleave(self.noise_draws, dim=0)
        return self.edm.loss(lambda x, sigma: self.adapter(x, sigma, context), drawn, generator=generator)

    def _latent_gap(self, goal: Tensor, streams: dict[str, Tensor], actions: Tensor) -> Tensor:
        """What the codes tell of the action: the action loss with a neighbour's latent actions less that with one's own, under the same noise."""
        dealt = {**streams, "latent": streams["latent"].roll(1, dims=0)}
        own, other = (self._action_loss(goal, parts, actions, torch.Generator(actions.device).manual_seed(0)) for parts in (streams, dealt))
        return other - own

    def on_step(self, step: int, accelerator: Any = None) -> dict[str, float]:
        """After an optimizer step: an inverse model that learns may restart its dead codes."""
        return self.gidm.on_step(step, accelerator) if "gidm" in self.trainable and hasattr(self.gidm, "on_step") else {}

    @torch.no_grad()
    def sample(self, views: dict[str, Tensor], text: list[str], *, seed: int | Sequence[int] = 0) -> Tensor:
        """View name -> (B, 3, H, W) in [-1, 1], B strings -> actions (B, A, 7). A row depends on its own seed only."""
        seeds = [seed] * len(text) if isinstance(seed, int) else list(seed)
        goal, streams, _ = self._infer(self._look(views, text, taught=False), text)
        context = self.adapter.encode(goal, streams)
        noise = seeded_noise(seeds, (self.adapter.horizon, self.adapter.action_dim), goal.device)
        return self.edm.sample(lambda x, sigma: self.adapter(x, sigma, context), noise)

    @torch.no_grad()
    def precompute(self, views: dict[str, Tensor], text: list[str], futures: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the frozen parts say, in fp16, to be handed back as PolicyBatch["frozen"].

        features (B, V, F, L, C), where the present is real now (B, V, N, E), and with alignment target (B, V, P, N, E).
        """
        if "gfdm" in self.trainable:
            raise ValueError("the forward model is trained, so its features change and cannot be precomputed; set cache=false")
        seen = {name: tensor.half() for name, tensor in self._look(views, text, futures).items()}
        for name, tensor in seen.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} leaves the range of fp16 and cannot be cached; set cache=false")
        return seen

    def _look(self, views: dict[str, Tensor], text: list[str], futures: dict[str, Tensor] | None = None, *, taught: bool = True) -> dict[str, Tensor]:
        """Run the parts that see pictures, all views in one pass. In use nothing is `taught`, and no future is known."""
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
            if self.sees_now:
                seen["now"] = _by_view(self.gidm.embed((images + 1) / 2), count)
        if self.alignment_weight and taught:
            if futures is None:
                raise ValueError("alignment_weight needs the true future frames; set data.future_frames=${policy.pair_frames}")
            wrong = {name: frames.shape[1] for name, frames in futures.items() if frames.shape[1] != len(self.pair_frames)}
            if wrong:
                raise ValueError(f"true frames of each view {wrong}, pair_frames {list(self.pair_frames)}: set data.future_frames=${{policy.pair_frames}}")
            target = torch.stack([futures[self.views[view]] for view in self.pairs_of], dim=1)  # (B, V, P, 3, H, W)
            seen["target"] = self.gidm.embed((target.flatten(0, 2) + 1) / 2).unflatten(0, target.shape[:3])
        return seen

    def _imagine(self, images: Tensor, text: list[str]) -> Tensor:
        if "gfdm" in self.trainable:
            return self.gfdm.imagine(images, text, seed=self.imagine_seed)
        with torch.no_grad():
            return self.forward_model.imagine(images, text, seed=self.imagine_seed)

    def _infer(self, frozen: dict[str, Tensor], text: list[str]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """From what was seen to the adapter's streams, and the losses and metrics met on the way."""
        device = self.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else next(self.adapter.parameters()).dtype
        now = frozen["now"].to(device, dtype) if self.sees_now else None
        features = self.feature_norm(frozen["features"].to(device, dtype))
        present, seen = self.projector.pair(features, self.pair_frames, self.gidm.num_tokens, now)  # (B, V, P, N, E)
        present, future = present[:, self.pairs_of], seen[:, self.pairs_of]
        pairs = future.shape[:3]
        repeats = pairs[1] * pairs[2]
        texts = [sentence for sentence in text for _ in range(repeats)]
        latent = self.gidm.infer(present.expand_as(future).flatten(0, 2), future.flatten(0, 2), texts)
        tokens = self.gidm.lift(latent.quantized)  # (B*V*P, K, E)
        streams = {"video": self.video_former(features)}
        if self.gidm.num_actions:
            streams["latent"] = tokens.unflatten(0, (len(text), repeats)).flatten(1, 2)
        if self.fuse_grid:
            streams["future"] = pool_grid(seen, self.fuse_grid).flatten(1, 3)
        if self.fuse_grid and self.fuse_now:
            streams["now"] = pool_grid(now, self.fuse_grid).flatten(1, 2)
        extra = {"bottleneck_loss": latent.loss}
        if latent.codes is not None:
            extra["codes"] = code_counts(latent.codes, self.gidm.num_codes)
        if "target" in frozen:
            extra["alignment_loss"] = (future.float() - frozen["target"].to(future.device).float()).square().mean()
        return self.goal_norm(self.goal.pooled(text).to(device)), streams, extra


def _by_view(stacked: Tensor, views: int) -> Tensor:
    """(V*B, ...) -> (B, V, ...)."""
    return stacked.unflatten(0, (views, -1)).transpose(0, 1)
