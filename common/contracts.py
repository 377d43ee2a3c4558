"""The interfaces between the folders: what datasets give to models, and what the steps provide to each other.

Legend: B batch, V views, F frames, N patch tokens, L feature tokens, K latent-action tokens, A actions in a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn


class VideoBatch(TypedDict):
    """Step 1. A short clip in the VAE's latent space and its sentence."""

    id: list[str]
    latents: Tensor  # (B, F, 4, h, w), already times the VAE's scaling factor
    text: list[str]


class FrameBatch(TypedDict):
    """Step 1, for a forward model that predicts features. A short clip in pixels and its sentence."""

    id: list[str]
    frames: Tensor  # (B, F, 3, H, W) in [0, 1]
    text: list[str]


class TransitionBatch(TypedDict):
    """Step 2. Two frames about one second apart (Sec. 3.2) and the instruction."""

    id: list[str]
    frames: Tensor  # (B, 2, 3, H, W) in [0, 1]
    text: list[str]


class PolicyBatch(TypedDict, total=False):
    """Step 3. Views, instruction and actions. `encoded` may replace `views` and `futures` once it was computed."""

    id: list[str]
    views: dict[str, Tensor]  # view name -> (B, 3, H, W) in [-1, 1]
    text: list[str]
    actions: Tensor  # (B, A, 7), relative, in [-1, 1]
    encoded: dict[str, Tensor]  # stored outputs of the parts that read pictures, see DeFI.precompute
    futures: dict[str, Tensor]  # view name -> (B, P, 3, H, W) in [-1, 1], true frames at the inferred pairs


class LatentAction(NamedTuple):
    """What the inverse model infers from two frames (Alg. 1)."""

    continuous: Tensor  # (B, K, d) before the bottleneck
    quantized: Tensor  # (B, K, d) after it, straight-through
    loss: Tensor  # () bottleneck loss, zero for the continuous bottleneck
    codes: Tensor | None = None  # (B, K) indices, discrete bottlenecks only


class TrainableModel(nn.Module):
    """What common.loop trains: a module with hooks, whose defaults do nothing.

    `forward(batch)` returns {"loss": scalar, **metrics}. Metrics are scalar tensors, which the loop averages. A metric
    of integers, of any shape, is a count: the loop adds it up over batches and ranks for `metrics_from_counts`.
    """

    def parameter_groups(self) -> list[dict[str, Any]] | None:
        """Groups for the optimizer, as torch.optim takes them; None for the groups of common.optim."""
        return None

    def on_train_begin(self, step: int) -> None:
        """Called before the first optimizer step of a run, at `step` 0, or at the step where a run resumes."""

    def on_step_end(self, step: int, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Called after optimizer step number `step`. Returns metrics to log with that step."""
        return {}

    def metrics_from_counts(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """Metrics from the counts of many batches; called where `forward` returns metrics of integers."""
        raise NotImplementedError(f"{type(self).__name__} counts {', '.join(counts)} but makes no metrics of them")


@runtime_checkable
class OwnsWeightFiles(Protocol):
    """A model that writes and reads the weight files of its artifact itself, in place of weights.safetensors."""

    def save_weights(self, folder: Path) -> None:
        """Write the weights into a folder that exists."""

    def load_weights(self, folder: Path) -> None:
        """Read what `save_weights` wrote. Raises UserError where it does not fit the model."""


class FutureDynamics(Protocol):
    """What step 1 provides to step 3 (Sec. 3.1)."""

    feature_dim: int
    num_frames: int
    num_tokens: int

    def imagine(self, image: Tensor, text: list[str], *, seed: int = 0) -> Tensor:
        """(B, 3, H, W) in [-1, 1], B strings -> (B, F, L, feature_dim): features of the next frames, after
        one denoising step."""

    def compile_unet(self, **options: Any) -> None:
        """Apply torch.compile to what `imagine` computes, with its options; may do nothing."""

    def freeze_unused_blocks(self) -> None:
        """Set requires_grad to False for the parts that `imagine` never computes."""


class InverseDynamics(Protocol):
    """What step 2 provides to step 3 (Sec. 3.2)."""

    embed_dim: int
    num_tokens: int  # N, visual tokens of a picture
    num_action_tokens: int  # K
    num_codes: int  # C, 0 where latent actions are continuous

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, N, embed_dim) frozen visual tokens."""

    def infer(self, now: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        """Visual tokens (B, N, embed_dim) of two frames -> the latent action between them."""

    def embed_action(self, quantized: Tensor) -> Tensor:
        """(B, K, d) -> (B, K, embed_dim): latent actions at the width of the visual tokens."""

    def drop_decoder(self) -> None:
        """Remove the parts that only pretraining needs (A.3)."""

    def freeze_codebook(self) -> None:
        """Keep the codes fixed: they neither learn nor restart; the bottleneck's loss only draws latents to them."""


class ChunkPolicy(Protocol):
    """What a rollout needs from a policy: one batched call that predicts actions for several simulators."""

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
