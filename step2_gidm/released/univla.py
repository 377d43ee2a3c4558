"""The names of UniVLA's first-stage latent action model, which DeFI's release keeps, and ours (Sec. 3.2; UniVLA
lam-stage-1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from common.checkpoint import renamed

# in order; the norms of a block are numbered, and what stands second differs between encoder and decoder
KEY_MAPPING = (
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
_POLICY = "of a policy, whose inverse model it is; python -m step3_defi.import_weights reads all of it"
IGNORED_PREFIXES = {  # what a file holds that the inverse model does not need, and why
    "lam.dino_encoder.": "DINOv2, frozen; ours is named by gidm.vision.path",
    "lam.text_encoder.": "T5, frozen; ours is named by gidm.text.path",
    **dict.fromkeys(
        ("Video_Former.", "goal_emb.", "time_pos_emb", "model.inner_model.", "language_goal.", "TVP_encoder."), _POLICY
    ),
}
SECOND_STAGE = ("vq_action.", "to_codebook_uncontrol.", "action_up_uncontrol.")


def prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names as Lightning and policies have them: the model's under `lam.`, also where a file holds nothing else."""
    bare = not any(name.startswith("lam.") for name in tensors)
    return {f"lam.{name}" if bare else name: tensor for name, tensor in tensors.items()}


def from_univla(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of UniVLA's first stage, of the release, or of the release's policy -> the state of our GIDM in the
    `official` preset.

    What stands under the prefixes of UNUSED_PREFIXES is left out. A name in the model that nothing is known of stays as it is, for
    strict loading to
    name it. The policy's has no decoder and no `patch_up`: it fits a GIDM after `drop_decoder`. ValueError: UniVLA's
    second stage, no
    latent action model at all, or strangers beside it.
    """
    inside = {
        name: tensor for name, tensor in prefixed(tensors).items() if not name.startswith(tuple(IGNORED_PREFIXES))
    }
    strangers = sorted(name for name in inside if not name.startswith("lam."))
    model = {name.removeprefix("lam."): tensor for name, tensor in inside.items()}
    if second := sorted({name for name in model if name.startswith(SECOND_STAGE)}):
        raise ValueError(
            f"this is UniVLA's second stage ({', '.join(second)}); the inverse model is its first, lam-stage-1"
        )
    if "action_latent" not in model or "vq.codebook.weight" not in model:
        raise ValueError(
            f"no latent action model (lam.action_latent, lam.vq.codebook.weight) among its {len(tensors)} tensors, "
            f"which start with: {', '.join(sorted({name.split('.')[0] for name in tensors}))}"
        )
    if strangers:
        raise ValueError(
            f"{len(strangers)} unexpected beside lam.*, known neither of a latent action model nor of a policy: "
            f"{', '.join(strangers)}"
        )
    state = {renamed(name, KEY_MAPPING): tensor for name, tensor in model.items()}
    state["queries"] = state["queries"].flatten(0, -2)  # (1, 1, K, E)
    state["quantizer.counts"] = (
        state["quantizer.codebook"].new_zeros(len(state["quantizer.codebook"])).long()
    )  # what ours counts between restarts
    return state
