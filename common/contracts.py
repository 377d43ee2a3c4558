"""The plugs between the rooms: what datasets hand to models, and what the steps promise each other (DESIGN 4).

Legend: B batch, V views, F frames, N patch tokens, L feature tokens, K latent-action tokens, A actions in a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
from torch import Tensor


class VideoBatch(TypedDict):
    """Step 1. A short clip in the VAE's latent space and the sentence that belongs to it."""

    id: list[str]
    latents: Tensor  # (B, F, 4, h, w), already times the VAE's scaling factor
    text: list[str]


class FrameBatch(TypedDict):
    """Step 1, for a forward model of features. A short clip as it is, and the sentence that belongs to it."""

    id: list[str]
    frames: Tensor  # (B, F, 3, H, W) in [0, 1]
    text: list[str]


class TransitionBatch(TypedDict):
    """Step 2. Two frames about one second apart (Sec. 3.2) and the instruction."""

    id: list[str]
    frames: Tensor  # (B, 2, 3, H, W) in [0, 1]
    text: list[str]


class PolicyBatch(TypedDict, total=False):
    """Step 3. What the robot sees, is told and did. `frozen` may stand in for `views` once it was computed."""

    id: list[str]
    views: dict[str, Tensor]  # view name -> (B, 3, H, W) in [-1, 1]
    text: list[str]
    actions: Tensor  # (B, A, 7), relative, in [-1, 1]
    frozen: dict[str, Tensor]  # cached outputs of the frozen parts, see DeFI.precompute
    futures: dict[str, Tensor]  # view name -> (B, P, 3, H, W) in [-1, 1], true frames at the inferred pairs


class LatentAction(NamedTuple):
    """What the inverse model infers between two frames (Alg. 1)."""

    continuous: Tensor  # (B, K, d) before the bottleneck
    quantized: Tensor  # (B, K, d) after it, straight-through
    loss: Tensor  # () bottleneck loss, zero for the continuous bottleneck
    codes: Tensor | None = None  # (B, K) indices, discrete bottlenecks only


class FutureDynamics(Protocol):
    """What step 1 promises to step 3 (Sec. 3.1)."""

    feature_dim: int
    num_frames: int
    num_tokens: int

    def imagine(self, image: Tensor, text: list[str], *, seed: int = 0) -> Tensor:
        """(B, 3, H, W) in [-1, 1], B strings -> (B, F, L, feature_dim): features of the next frames, one denoising
        step."""

    def freeze_unused_blocks(self) -> None:
        """Take the gradient from what `imagine` never computes."""


class InverseDynamics(Protocol):
    """What step 2 promises to step 3 (Sec. 3.2)."""

    embed_dim: int
    num_tokens: int  # N, visual tokens of a picture
    num_action_tokens: int  # K
    num_codes: int  # C, 0 where latent actions are continuous

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, N, embed_dim) frozen visual tokens."""

    def infer(self, now: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        """Visual tokens (B, N, embed_dim) of two moments -> the latent action that links them."""

    def embed_action(self, quantized: Tensor) -> Tensor:
        """(B, K, d) -> (B, K, embed_dim): latent actions at the width of the visual tokens."""

    def drop_decoder(self) -> None:
        """Forget what only pretraining needs (A.3)."""

    def freeze_codebook(self) -> None:
        """Keep the codes as they are: they neither learn nor restart, and the bottleneck's loss only draws latents to
        them."""


class ChunkPolicy(Protocol):
    """What a rollout asks of a policy: one batched call that plans for several simulators at once."""

    execute: int  # actions of a chunk that are carried out before the next plan

    def predict_action_chunk(
        self,
        observations: list[dict],
        instructions: list[str],
        *,
        rollout_keys: Sequence[tuple[int, int, int, int]] | None = None,
    ) -> np.ndarray:
        """Observations in CALVIN's format, one instruction each -> (B, A, 7) actions, gripper -1 or 1.

        Actions outside [-1, 1] are clipped, and counted, where they are carried out. A rollout gives one key for each
        observation: (seed, sequence, place of the sub-task in it, place of the plan in that). The noise that a policy
        samples with then depends on the key alone, so that a rollout repeats.
        """
