"""Forward, inverse and action objectives trained together: what Sec. 1 and 3 argue against, as a row
(`experiment=defi/joint`).

B batch, F frames of a clip, V views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.contracts import InverseDynamics, PolicyBatch
from step1_gfdm import GFDM
from step2_gidm import GIDM
from step3_defi.model import PARTS, DeFI


class JointDeFI(DeFI):
    """DeFI without pretraining: one run minimises the action loss, the GFDM's video loss and the GIDM's reconstruction
    loss.

    All parts learn but the third-party encoders and the VAE. Every window gives one action chunk, one clip (the present
    and the true
    frames that follow, of a view that is drawn, as step 1 draws a camera) and one pair of moments (the clip's first and
    last frame, a
    second apart, as in step 2). `video_weight` and `reconstruction_weight` are relative to the action loss. In use it
    is a DeFI.
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
        """The decoder stays: its reconstruction is one of the objectives."""

    def set_trainable(self, names: Sequence[str]) -> None:
        """Let every part learn, the blocks that `imagine` never reaches too: the video loss does reach them."""
        if missing := [name for name in PARTS if name not in names]:
            raise ValueError(f"joint training trains every part; trainable lacks {missing}")
        super().set_trainable(names)
        self.gfdm.requires_grad_(True)

    def forward(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """DeFI's loss and metrics, plus both models' own, over PolicyBatch["futures"] of all frames 1..F-1."""
        clips = self._clips(batch)
        out = super().forward(
            {**batch, "futures": {name: clip[:, list(self.pair_frames)] for name, clip in clips.items()}}
        )
        clip = self._draw(clips)
        video = self.video_loss(clip, batch)
        pair = self.gidm({"id": batch["id"], "frames": (clip[:, [0, -1]] + 1) / 2, "text": batch["text"]})
        loss = out["loss"] + self.video_weight * video + self.reconstruction_weight * pair["loss"]
        own = {
            f"reconstruction_{name}": pair[name].detach() for name in ("loss", "mse", "copy_mse", "gap") if name in pair
        }
        return {**out, "loss": loss, "video_loss": video.detach(), **own}

    def video_loss(self, clip: Tensor, batch: PolicyBatch) -> Tensor:
        """(B, F, 3, H, W) in [-1, 1] -> (), what step 1 minimises."""
        latents = self.gfdm.encode_image(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
        return self.gfdm({"id": batch["id"], "latents": latents, "text": batch["text"]})["loss"]

    def _clips(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """View name -> (B, F, 3, H, W), the present first."""
        futures = batch.get("futures")
        if futures is None or any(futures[name].shape[1] != self.gfdm.num_frames - 1 for name in self.views):
            raise ValueError(
                f"joint training needs the true frames 1..{self.gfdm.num_frames - 1} of every view; set "
                f"data.future_frames={self.gfdm.num_frames}"
            )
        return {name: torch.cat([batch["views"][name][:, None], futures[name]], dim=1) for name in self.views}

    def _draw(self, clips: dict[str, Tensor]) -> Tensor:
        """One view a sample."""
        drawn = torch.randint(len(self.views), (len(next(iter(clips.values()))),)).tolist()
        return torch.stack([clips[self.views[view]][row] for row, view in enumerate(drawn)])
