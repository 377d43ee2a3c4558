"""VPP as the special case of DeFI that infers no latent action: what stands in the inverse model's place (Table 1; Hu
et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from common.contracts import LatentAction


class NullInverseDynamics(nn.Module):
    """contracts.InverseDynamics of zero tokens: the adapter gets no stream of latent actions."""

    embed_dim = num_tokens = num_action_tokens = num_codes = 0

    def embed(self, image: Tensor) -> Tensor:
        """Nothing asks: `NullProjector` pairs no moments."""
        raise ValueError(
            "this policy has no inverse model, hence no visual tokens: it takes no alignment_weight and no stream now"
        )

    def infer(self, now: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        """(B, 0, 0) twice -> no latent action, at no loss."""
        return LatentAction(now, now, now.new_zeros(()))

    def embed_action(self, quantized: Tensor) -> Tensor:
        """(B, 0, 0) as it is."""
        return quantized

    def drop_decoder(self) -> None:
        """There is none."""

    def freeze_codebook(self) -> None:
        """There are none."""


class NullProjector(nn.Module):
    """A projector onto nothing."""

    uses_present_tokens = False

    def __init__(self, feature_dim: int, out_dim: int) -> None:
        super().__init__()

    def project_pairs(
        self, features: Tensor, frames: Sequence[int], tokens: int, now: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """features (B, V, F, L, C) -> two moments (B, V, 1, 0, 0) and (B, V, P, 0, 0)."""
        empty = features[:, :, list(frames), :0, :0]
        return empty[:, :, :1], empty
