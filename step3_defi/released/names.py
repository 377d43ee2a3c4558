"""The names of the release's policies and VPP's, and ours (official release Step 3; VPP's dp-calvin)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint import counted, renamed
from step2_gidm import from_univla

# in order: a later line sees what an earlier one made
KEY_MAPPING = (
    (r"^goal_emb\.0\.", "projector.fc1."),
    (r"^goal_emb\.2\.", "projector.fc2."),
    (r"^time_pos_emb$", "projector.moments"),
    (r"^Video_Former\.goal_emb\.", "video_former.embed."),
    (r"^Video_Former\.latents$", "video_former.queries"),
    (r"^Video_Former\.time_pos_emb$", "video_former.frame"),
    (r"^Video_Former\.", "video_former."),
    (r"^(video_former\.layers\.\d+)\.0\.norm_latents\.", r"\1.norm_queries."),
    (r"^(video_former\.layers\.\d+)\.0\.norm_media\.", r"\1.norm_features."),
    (r"^(video_former\.layers\.\d+)\.0\.", r"\1.spatial."),
    (r"^(video_former\.layers\.\d+)\.1\.proj\.", r"\1.temporal.to_out."),
    (r"^(video_former\.layers\.\d+)\.1\.to_", r"\1.temporal.to_"),
    (r"^(video_former\.layers\.\d+)\.2\.0\.", r"\1.norm_mlp."),
    (r"^(video_former\.layers\.\d+)\.2\.1\.", r"\1.mlp.fc1."),
    (r"^(video_former\.layers\.\d+)\.2\.3\.", r"\1.mlp.fc2."),
    (r"^model\.inner_model\.tok_emb\.", "adapter.streams.video."),
    (r"^model\.inner_model\.tok_emb_token\.", "adapter.streams.latent."),
    (r"^model\.inner_model\.lang_emb\.", "adapter.goal."),
    (r"^model\.inner_model\.action_emb\.", "adapter.embed."),
    (r"^model\.inner_model\.action_pred\.", "adapter.out."),
    (r"^model\.inner_model\.sigma_emb\.1\.", "adapter.sigma.fc1."),
    (r"^model\.inner_model\.sigma_emb\.3\.", "adapter.sigma.fc2."),
    (r"^model\.inner_model\.encoder\.ln\.", "adapter.encoder_norm."),
    (r"^model\.inner_model\.decoder\.ln\.", "adapter.norm."),
    (r"^model\.inner_model\.(encoder|decoder)\.blocks\.", r"adapter.\1."),
    (r"^(adapter\.\w+\.\d+)\.ln_1\.", r"\1.norm_self."),
    (r"^(adapter\.\w+\.\d+)\.ln_2\.", r"\1.norm_mlp."),
    (r"^(adapter\.\w+\.\d+)\.ln3\.", r"\1.norm_cross."),
    (r"^(adapter\.\w+\.\d+)\.attn\.", r"\1.self_attention."),
    (r"^(adapter\.\w+\.\d+)\.cross_att\.", r"\1.cross_attention."),
    (r"^(adapter\.\w+\.\d+\.\w+_attention)\.query\.", r"\1.to_q."),
    (r"^(adapter\.\w+\.\d+\.\w+_attention)\.key\.", r"\1.to_k."),
    (r"^(adapter\.\w+\.\d+\.\w+_attention)\.value\.", r"\1.to_v."),
    (r"^(adapter\.\w+\.\d+\.\w+_attention)\.c_proj\.", r"\1.to_out."),
    (r"^(adapter\.\w+\.\d+\.mlp)\.c_fc\.", r"\1.fc1."),
    (r"^(adapter\.\w+\.\d+\.mlp)\.c_proj\.", r"\1.fc2."),
    (r"^(adapter\.\w+\.\d+)\.adaLN_zero\.modulation\.1\.", r"\1.adaln."),
)
IGNORED_PREFIXES = {  # what a policy's file holds that ours does not need, and why
    "language_goal.": "OpenAI's CLIP, frozen, for the goal; ours is named by policy.goal.path",
    "TVP_encoder.": "the frozen forward model with its CLIP; ours is the gfdm that is named beside the policy",
    "lam.text_encoder.": "T5, frozen; ours is named by the gidm",
    "lam.dino_encoder.": "DINOv2, frozen; ours is named by the gidm",
    "model.inner_model.goal_emb.": "never used: the goal goes through lang_emb",
    "model.inner_model.proprio_emb.": "never used: CALVIN's policies get no proprioception",
    "model.inner_model.pos_emb": "never used: nothing has a position",
}


class Release(NamedTuple):
    """A policy of the release, or VPP's, under our names."""

    state: dict[str, Tensor]  # of a DeFI of the `official` or `vpp` preset, whose forward model is frozen
    left: dict[str, int]  # prefix of UNUSED_PREFIXES -> how many numbers the file holds there
    inverse: bool  # whether it has an inverse model: the release's has, VPP's has not


def from_release(tensors: Mapping[str, Tensor]) -> Release:
    """Tensors of a policy by their published names -> ours. An unknown name stays as it is, for strict loading to name
    it.

    ValueError: no policy at all.
    """
    if "Video_Former.latents" not in tensors or "model.inner_model.action_emb.weight" not in tensors:
        raise ValueError(
            "no policy of the release or of VPP (Video_Former.latents, model.inner_model.action_emb.weight) among its "
            f"{len(tensors)} "
            f"tensors, which start with: {', '.join(sorted({name.split('.')[0] for name in tensors}))}"
        )
    inverse = {name: tensor for name, tensor in tensors.items() if name.startswith("lam.")}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(("lam.", *IGNORED_PREFIXES))}
    state = {f"gidm.{name}": tensor for name, tensor in from_univla(inverse).items()} if inverse else {}
    for name, tensor in rest.items():
        state.update(_ours(name, tensor))
    return Release(state, counted(tensors, IGNORED_PREFIXES), bool(inverse))


def _ours(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if temporal := re.fullmatch(r"(Video_Former\.layers\.\d+\.1)\.qkv\.(weight|bias)", name):  # q, k and v in one layer
        parts = zip("qkv", torch.chunk(tensor, 3))
        return {
            made: part
            for letter, third in parts
            for made, part in _ours(f"{temporal[1]}.to_{letter}.{temporal[2]}", third).items()
        }
    return {renamed(name, KEY_MAPPING): tensor}
