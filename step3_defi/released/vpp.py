"""VPP as the special case of DeFI without an inverse model: what replaces it (Table 1; Hu et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from common.contracts import LatentAction
from common.errors import UserError


class NullInverseDynamics(nn.Module):
    """A contracts.InverseDynamics of zero tokens, so that the adapter gets no stream of latent actions."""

    embed_dim = num_tokens = num_action_tokens = num_codes = 0

    def embed(self, image: Tensor) -> Tensor:
        """Never called by a policy that is configured as VPP, because NullProjector pairs no frames."""
        raise UserError(
            "this policy has no inverse model and hence no visual tokens: set policy.alignment.weight=0, and leave "
            '"now" out of policy.streams.names'
        )

    def infer(self, now: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        """Two empty tensors (B, 0, 0) -> an empty latent action with zero loss."""
        return LatentAction(now, now, now.new_zeros(()))

    def embed_action(self, quantized: Tensor) -> Tensor:
        """(B, 0, 0) -> the same tensor."""
        return quantized

    def drop_decoder(self) -> None:
        """Do nothing: there is no decoder."""

    def freeze_codebook(self) -> None:
        """Do nothing: there is no codebook."""


class NullProjector(nn.Module):
    """A projector onto zero tokens."""

    uses_present_tokens = False

    def __init__(self, feature_dim: int, out_dim: int) -> None:
        super().__init__()

    def project_pairs(
        self, features: Tensor, frames: Sequence[int], num_tokens: int, present_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """features (B, V, F, L, C) -> present (B, V, 1, 0, 0), futures (B, V, P, 0, 0)."""
        empty = features[:, :, list(frames), :0, :0]
        return empty[:, :, :1], empty
