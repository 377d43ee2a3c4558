"""From the tensor names of UniVLA's first-stage latent action model, which DeFI's release keeps, to ours (Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from common.checkpoint import renamed
from common.errors import UserError

# Applied in this order. UniVLA numbers the norms of a block, and the second one differs between encoder and decoder.
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
_POLICY = "part of the policy around the inverse model; python -m step3_defi.released.import_weights reads all of it"
IGNORED_PREFIXES = {  # prefix of tensors that the inverse model does not need: why
    "lam.dino_encoder.": "DINOv2, frozen; ours is named by gidm.vision.path",
    "lam.text_encoder.": "T5, frozen; ours is named by gidm.text.path",
    **dict.fromkeys(
        ("Video_Former.", "goal_emb.", "time_pos_emb", "model.inner_model.", "language_goal.", "TVP_encoder."), _POLICY
    ),
}
SECOND_STAGE = ("vq_action.", "to_codebook_uncontrol.", "action_up_uncontrol.")


def with_lam_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names as in Lightning checkpoints and policies, where those of the inverse model start with `lam.`.

    They get this prefix where no name of the file has it, because then the file holds the inverse model alone.
    """
    bare = not any(name.startswith("lam.") for name in tensors)
    return {f"lam.{name}" if bare else name: tensor for name, tensor in tensors.items()}


def from_univla(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a checkpoint of UniVLA's first stage, of the release, or of the release's policy.

    Returns the state dict of our GIDM with the config gidm=official. Tensors under IGNORED_PREFIXES are left out. A
    name inside the model that has no counterpart is kept, so that strict loading reports it. The checkpoint of a policy
    has no decoder and no `patch_up`: it fits a GIDM after `drop_decoder`.

    Raises UserError for a checkpoint of UniVLA's second stage, for one without a latent action model, and for unknown
    tensors outside of the model.
    """
    kept = {name: tensor for name, tensor in with_lam_prefix(tensors).items() if not _is_ignored(name)}
    unknown = sorted(name for name in kept if not name.startswith("lam."))
    model = {name.removeprefix("lam."): tensor for name, tensor in kept.items()}
    if second := sorted({name for name in model if name.startswith(SECOND_STAGE)}):
        raise UserError(
            f"this is UniVLA's second stage ({', '.join(second)}); the inverse model is its first, lam-stage-1"
        )
    if "action_latent" not in model or "vq.codebook.weight" not in model:
        raise UserError(
            f"no latent action model (lam.action_latent, lam.vq.codebook.weight) among its {len(tensors)} tensors, "
            f"which start with: {', '.join(sorted({name.split('.')[0] for name in tensors}))}"
        )
    if unknown:
        raise UserError(
            f"{len(unknown)} unexpected besides lam.*, known neither from a latent action model nor from a policy: "
            f"{', '.join(unknown)}"
        )
    state = {renamed(name, KEY_MAPPING): tensor for name, tensor in model.items()}
    state["queries"] = state["queries"].flatten(0, -2)  # (1, 1, K, E) -> (K, E)
    codebook = state["quantizer.codebook"]
    state["quantizer.counts"] = codebook.new_zeros(len(codebook)).long()  # how often each code was used since a restart
    return state


def _is_ignored(name: str) -> bool:
    return name.startswith(tuple(IGNORED_PREFIXES))
