"""Parameter names of published policies and ours: the release's (Step 3) and VPP's (dp-calvin)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint import counted, renamed
from common.errors import UserError
from step2_gidm import from_univla

# (pattern of a published name, our name); applied in order, so that a later row sees what an earlier one replaced
KEY_MAPPING = (
    (r"^goal_emb\.0\.", "projector.fc1."),
    (r"^goal_emb\.2\.", "projector.fc2."),
    (r"^time_pos_emb$", "projector.time_pos_embed"),
    (r"^Video_Former\.goal_emb\.", "video_former.feature_embedder."),
    (r"^Video_Former\.latents$", "video_former.queries"),
    (r"^Video_Former\.time_pos_emb$", "video_former.frame_embed"),
    (r"^Video_Former\.", "video_former."),
    (r"^(video_former\.layers\.\d+)\.0\.norm_latents\.", r"\1.norm_queries."),
    (r"^(video_former\.layers\.\d+)\.0\.norm_media\.", r"\1.norm_features."),
    (r"^(video_former\.layers\.\d+)\.0\.", r"\1.spatial."),
    (r"^(video_former\.layers\.\d+)\.1\.proj\.", r"\1.temporal.to_out."),
    (r"^(video_former\.layers\.\d+)\.1\.to_", r"\1.temporal.to_"),
    (r"^(video_former\.layers\.\d+)\.2\.0\.", r"\1.norm_mlp."),
    (r"^(video_former\.layers\.\d+)\.2\.1\.", r"\1.mlp.fc1."),
    (r"^(video_former\.layers\.\d+)\.2\.3\.", r"\1.mlp.fc2."),
    (r"^model\.inner_model\.tok_emb\.", "adapter.stream_embedders.video."),
    (r"^model\.inner_model\.tok_emb_token\.", "adapter.stream_embedders.latent."),
    (r"^model\.inner_model\.lang_emb\.", "adapter.goal_embedder."),
    (r"^model\.inner_model\.action_emb\.", "adapter.action_embedder."),
    (r"^model\.inner_model\.action_pred\.", "adapter.out."),
    (r"^model\.inner_model\.sigma_emb\.1\.", "adapter.sigma_embedder.fc1."),
    (r"^model\.inner_model\.sigma_emb\.3\.", "adapter.sigma_embedder.fc2."),
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
    (r"^(adapter\.\w+\.\d+)\.adaLN_zero\.modulation\.1\.", r"\1.adaLN_modulation."),
)
IGNORED_PREFIXES = {  # prefix of published names that ours do not need -> the reason
    "language_goal.": "OpenAI's CLIP, frozen; policy.goal.path names ours",
    "TVP_encoder.": "the frozen forward model and its CLIP; parents.gfdm names ours",
    "lam.text_encoder.": "T5, frozen; the inverse model's config names ours",
    "lam.dino_encoder.": "DINOv2, frozen; the inverse model's config names ours",
    "model.inner_model.goal_emb.": "never used: the goal passes through lang_emb",
    "model.inner_model.proprio_emb.": "never used: policies for CALVIN get no proprioception",
    "model.inner_model.pos_emb": "never used: no token has a position",
}


class Release(NamedTuple):
    """A policy of the release, or VPP's, under our names."""

    state: dict[str, Tensor]  # state dict of a DeFI of the preset official or vpp, whose forward model does not learn
    unused: dict[str, int]  # prefix in IGNORED_PREFIXES -> how many numbers the file holds there
    has_gidm: bool  # whether the file holds an inverse model: the release's does, VPP's does not


def from_release(tensors: Mapping[str, Tensor]) -> Release:
    """Translate the tensors of a published policy to our names.

    An unknown name stays as it is, so that strict loading names it. Raises UserError if the file holds no such policy.
    """
    if "Video_Former.latents" not in tensors or "model.inner_model.action_emb.weight" not in tensors:
        raise UserError(
            "this is no policy of the release or of VPP: Video_Former.latents and model.inner_model.action_emb.weight "
            f"are not among its {len(tensors)} tensors, whose names start with "
            + ", ".join(sorted({name.split(".")[0] for name in tensors}))
        )
    gidm = {name: tensor for name, tensor in tensors.items() if name.startswith("lam.")}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(("lam.", *IGNORED_PREFIXES))}
    state = {f"gidm.{name}": tensor for name, tensor in from_univla(gidm).items()} if gidm else {}
    for name, tensor in rest.items():
        state.update(_translate(name, tensor))
    return Release(state, counted(tensors, IGNORED_PREFIXES), bool(gidm))


def _translate(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Our tensors for one published tensor.

    Published temporal attention computes queries, keys and values in one layer, ours in three.
    """
    temporal = re.fullmatch(r"(Video_Former\.layers\.\d+\.1)\.qkv\.(weight|bias)", name)
    if temporal is None:
        return {renamed(name, KEY_MAPPING): tensor}
    prefix, kind = temporal.groups()
    parts = zip("qkv", torch.chunk(tensor, 3))
    return {renamed(f"{prefix}.to_{letter}.{kind}", KEY_MAPPING): part for letter, part in parts}
