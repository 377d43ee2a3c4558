"""Forward, inverse and action objectives trained together (`experiment=defi/joint`), which Sec. 1 and 3 argue against.

B batch, F frames of a clip, V views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from common.contracts import InverseDynamics, PolicyBatch
from common.errors import UserError
from common.image_range import denormalize
from step1_gfdm import GFDM
from step2_gidm import GIDM
from step3_defi.config import PARTS, trainable_parts
from step3_defi.model import DeFI


class JointDeFI(DeFI):
    """DeFI without pretraining: one run minimizes the action loss, the GFDM's video loss and the GIDM's reconstruction.

    All parts learn, except the third-party encoders and the VAE. Every window gives one action chunk; one clip, which
    is the present and the true frames that follow, of one view drawn at random as step 1 draws a camera; and one pair
    of frames, the first and the last of the clip, one second apart as in step 2. `video_weight` and
    `reconstruction_weight` are relative to the action loss. When it acts, the policy is a DeFI.
    """

    def __init__(
        self,
        gfdm: GFDM,
        gidm: GIDM,
        *parts: Any,
        video_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(gfdm, gidm, *parts, **options)
        self.video_weight, self.reconstruction_weight = video_weight, reconstruction_weight

    def prepare_inverse_model(self, gidm: InverseDynamics) -> None:
        """Keep the decoder, because reconstruction is one of the objectives."""

    def set_trainable(self, choice: str | Sequence[str]) -> None:
        """Let every part learn, including the blocks that `imagine` never reaches, because the video loss does."""
        names = trainable_parts(choice)
        if missing := [name for name in PARTS if name not in names]:
            raise UserError(f"joint training trains every part, but policy.trainable lacks {missing}; set it to all")
        super().set_trainable(names)
        self.gfdm.requires_grad_(True)

    def forward(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """The loss and metrics of DeFI, plus those of both models; PolicyBatch["futures"] holds the frames 1..F-1."""
        clips = self._clips(batch)
        pair_frames = {name: clip[:, list(self.pair_frames)] for name, clip in clips.items()}
        out = super().forward({**batch, "futures": pair_frames})
        clip = self._draw(clips)  # (B, F, 3, H, W)
        video = self.video_loss(clip, batch)
        pair = self.gidm({"id": batch["id"], "frames": denormalize(clip[:, [0, -1]]), "text": batch["text"]})
        loss = out["loss"] + self.video_weight * video + self.reconstruction_weight * pair["loss"]
        names = [name for name in ("loss", "mse", "copy_mse", "gap") if name in pair]
        reconstruction = {f"reconstruction_{name}": pair[name].detach() for name in names}
        return {**out, "loss": loss, "video_loss": video.detach(), **reconstruction}

    def video_loss(self, clip: Tensor, batch: PolicyBatch) -> Tensor:
        """The loss of step 1 for clips (B, F, 3, H, W) in [-1, 1]."""
        latents = self.gfdm.encode_image(rearrange(clip, "b f c h w -> (b f) c h w"))
        latents = rearrange(latents, "(b f) c h w -> b f c h w", b=len(clip))
        return self.gfdm({"id": batch["id"], "latents": latents, "text": batch["text"]})["loss"]

    def _clips(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """View name -> (B, F, 3, H, W) in [-1, 1], the present first."""
        futures = batch.get("futures")
        if futures is None or any(futures[name].shape[1] != self.gfdm.num_frames - 1 for name in self.views):
            raise UserError(
                f"joint training needs the true frames 1..{self.gfdm.num_frames - 1} of every view; set "
                f"data.future_frames={self.gfdm.num_frames}"
            )
        return {name: torch.cat([batch["views"][name][:, None], futures[name]], dim=1) for name in self.views}

    def _draw(self, clips: dict[str, Tensor]) -> Tensor:
        """The clips of one randomly drawn view for each sample, (B, F, 3, H, W)."""
        batch = len(next(iter(clips.values())))
        drawn = torch.randint(len(self.views), (batch,)).tolist()
        return torch.stack([clips[self.views[view]][row] for row, view in enumerate(drawn)])
