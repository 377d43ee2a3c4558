"""The plugs between the rooms: what datasets hand to models, and what the steps promise each other (DESIGN 4).

Legend: B batch, V views, F frames, N patch tokens, L feature tokens, K latent-action tokens, A actions in a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypedDict

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

    def freeze_untapped(self) -> None:
        """Take the gradient from what `imagine` never computes."""


class InverseDynamics(Protocol):
    """What step 2 promises to step 3 (Sec. 3.2)."""

    embed_dim: int
    num_tokens: int  # N, visual tokens of a picture
    num_actions: int  # K
    num_codes: int  # C, 0 where latent actions are continuous

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, N, embed_dim) frozen visual tokens."""

    def infer(self, now: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        """Visual tokens (B, N, embed_dim) of two moments -> the latent action that links them."""

    def lift(self, quantized: Tensor) -> Tensor:
        """(B, K, d) -> (B, K, embed_dim): latent actions at the width of the visual tokens."""

    def drop_decoder(self) -> None:
        """Forget what only pretraining needs (A.3)."""

    def freeze_codes(self) -> None:
        """Keep the codes as they are: they neither learn nor restart, and the bottleneck's loss only draws latents to
        them."""


class ChunkPolicy(Protocol):
    """What a rollout asks of a policy: one batched call that plans for several simulators at once."""

    execute: int  # actions of a chunk that are carried out before the next plan

    def plan(self, observations: list[dict], instructions: list[str]) -> np.ndarray:
        """Observations in CALVIN's format, one instruction each -> (B, A, 7) actions, gripper -1 or 1.

        What leaves [-1, 1] is clipped, and counted, where it is carried out.
        """


class Expert(Protocol):
    """A scripted policy with privileged state, made by an environment for itself."""

    def reset(self, task: str) -> None:
        """Start on a task from wherever the robot stands."""

    def act(self) -> np.ndarray:
        """The next (7,) action."""


class Env(Protocol):
    """A benchmark with CALVIN's protocol: simulator, oracle, sentences and five-in-a-row sequences in one."""

    name: str  # the world and scene that reports print, for instance "playtable-D"

    def sequences(
        self, count: int, *, tasks: list[str] | None = None, length: int = 5, seed: int = 0
    ) -> list[tuple[dict, list[str]]]:
        """`count` pairs of (symbolic initial state, tasks in a row); `tasks` restricts the vocabulary."""

    def reset(
        self, state: dict | None = None, *, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None
    ) -> dict:
        """Put the world into a symbolic state, or into raw vectors; returns the observation without pictures."""

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[dict, dict]:
        """One control step of 1/30 s with a (7,) relative action -> (observation, info); pictures only when asked."""

    def observe(self) -> dict:
        """The present observation with pictures: rgb_obs/{rgb_static (200,200,3), rgb_gripper (84,84,3)} uint8,
        robot_obs (15,), scene_obs (24,)."""

    def get_info(self) -> dict[str, Any]:
        """CALVIN's privileged info, which the oracle compares between two moments."""

    def instruction(self, task: str) -> str:
        """The sentence that the policy is told."""

    def succeeded(self, task: str, start: dict, now: dict) -> bool:
        """The oracle: was `task` carried out between two infos?"""

    def expert(self, seed: int = 0) -> Expert:
        """A scripted expert bound to this environment."""

    def versions(self) -> dict[str, str]:
        """Simulator and renderer with their versions, for the result file."""

    def choices(self) -> dict[str, Any]:
        """Arguments of its constructor in place of what it chose by itself, a renderer: another one made with them
        draws alike."""

    def close(self) -> None:
        """Free the simulator and its GL context."""
