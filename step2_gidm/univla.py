"""The names of UniVLA's first-stage latent action model, which DeFI's release keeps, and ours (Sec. 3.2; UniVLA lam-stage-1)."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from common.checkpoint import renamed

# in order; the norms of a block are numbered, and what stands second differs between encoder and decoder
NAMES = (
    (r"^action_latent$", "queries"),
    (r"^to_codebook\.", "to_latent."),
    (r"^vq\.codebook\.weight$", "quantizer.codebook"),
    (r"^lang_proj\.", "text_proj."),
    (r"^(encoder|decoder)\.ffn\.", r"\1.stem."),
    (r"^(encoder|decoder)\.transformer_blocks\.", r"\1.blocks."),
    (r"^(encoder\.blocks\.\d+)\.norm2\.", r"\1.norm_temporal."),
    (r"^(encoder\.blocks\.\d+)\.norm3\.", r"\1.norm_mlp."),
    (r"^(decoder\.blocks\.\d+)\.norm2\.", r"\1.norm_mlp."),
    (r"(\.blocks\.\d+)\.norm1\.", r"\1.norm_spatial."),
    (r"(\.blocks\.\d+)\.(spatial|temporal)_attn\.to_out\.0\.", r"\1.\2.to_out."),
    (r"(\.blocks\.\d+)\.(spatial|temporal)_attn\.", r"\1.\2."),
    (r"(\.blocks\.\d+)\.ffn\.0\.", r"\1.mlp.fc1."),
    (r"(\.blocks\.\d+)\.ffn\.3\.", r"\1.mlp.fc2."),
)
FROZEN = ("dino_encoder.", "text_encoder.")  # copies of DINOv2 and T5, which ours name and do not hold
SECOND_STAGE = ("vq_action.", "to_codebook_uncontrol.", "action_up_uncontrol.")


def from_univla(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of UniVLA's first stage, of the release, or of the release's policy -> the state of our GIDM in the `official` preset.

    Where names start with `lam.`, only those are the model and the others (of a policy) are left out. Frozen DINOv2 and T5 are left out.
    A name that nothing is known of stays as it is, for strict loading to name it. The policy's has no decoder and no `patch_up`:
    it fits a GIDM after `drop_decoder`. ValueError: UniVLA's second stage, or no latent action model at all.
    """
    inside = {name.removeprefix("lam."): tensor for name, tensor in tensors.items() if name.startswith("lam.")} or dict(tensors)
    if second := sorted({name for name in inside if name.startswith(SECOND_STAGE)}):
        raise ValueError(f"this is UniVLA's second stage ({', '.join(second)}); the inverse model is its first, lam-stage-1")
    if "action_latent" not in inside or "vq.codebook.weight" not in inside:
        raise ValueError(f"no latent action model (lam.action_latent, lam.vq.codebook.weight) among its {len(tensors)} tensors, "
                         f"which start with: {', '.join(sorted({name.split('.')[0] for name in tensors}))}")
    state = {renamed(name, NAMES): tensor for name, tensor in inside.items() if not name.startswith(FROZEN)}
    state["queries"] = state["queries"].flatten(0, -2)  # (1, 1, K, E)
    state["quantizer.counts"] = state["quantizer.codebook"].new_zeros(len(state["quantizer.codebook"])).long()  # what ours counts between restarts
    return state
