"""A DeFI artifact at work: pictures in, commands out, the chunk carried out before the next look (Sec. 3.4)."""
from __future__ import annotations

import logging
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from common import artifact
from common.calvin_format import KEYS
from common.frozen import encode_alone
from common.video import resize
from step3_defi.model import DeFI

log = logging.getLogger(__name__)


class DeFIPolicy:
    """contracts.ChunkPolicy over a DeFI model, and a single robot's `reset` and `act`.

    The first `execute` actions of a chunk are carried out. The noise of a plan comes from `seed` and obs["rollout_key"] (seed,
    sequence, sub-task, plan) where a rollout gives it, else the robot's state, so that a plan depends neither on the batch that
    it is made in nor on the plans before it.
    """

    def __init__(self, model: DeFI, *, execute: int = 10, seed: int = 0) -> None:
        if not 1 <= execute <= model.adapter.horizon:
            raise ValueError(f"execute={execute}: the policy plans {model.adapter.horizon} actions")
        self.model, self.execute, self.seed = model.eval(), execute, seed
        encode_alone(self.model)
        self.reset()

    def plan(self, observations: list[dict], instructions: list[str]) -> np.ndarray:
        """CALVIN observations and a sentence each -> (B, A, 7) float32 actions in [-1, 1], the gripper's exactly -1 or 1."""
        views = {view: self._images(observations, KEYS[view]).to(self.model.device) for view in self.model.views}
        seeds = [self._noise_seed(o) for o in observations]
        actions = self.model.sample(views, list(instructions), seed=seeds).float().cpu().numpy().clip(-1, 1)
        actions[..., 6] = np.where(actions[..., 6] > 0, 1.0, -1.0)
        return actions

    def reset(self) -> None:
        """Forget the chunk."""
        self._chunk: deque[np.ndarray] = deque()
        self._instruction: str | None = None

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The next (7,) action. A new instruction drops what was left of the chunk."""
        if instruction != self._instruction or not self._chunk:
            self._chunk = deque(self.plan([observation], [instruction])[0, :self.execute])
            self._instruction = instruction
        return self._chunk.popleft()

    def _noise_seed(self, observation: dict) -> int:
        if "rollout_key" in observation:
            return int(np.random.SeedSequence((self.seed, *observation["rollout_key"])).generate_state(1)[0] >> 1)
        return (self.seed + zlib.crc32(np.asarray(observation["robot_obs"], np.float64).tobytes())) % 2**31

    def _images(self, observations: list[dict], key: str) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        missing = [number for number, o in enumerate(observations) if key not in o.get("rgb_obs", {})]
        if missing:
            raise KeyError(f"observation {missing[0]} has no rgb_obs/{key}; the policy looks through {list(self.model.views)}")
        return resize(np.stack([o["rgb_obs"][key] for o in observations]), self.model.image_size) * 2 - 1


def load(folder: str | Path, *, execute: int = 10, seed: int = 0, device: str | torch.device = "cpu",
         overrides: dict[str, Any] | None = None) -> DeFIPolicy:
    """The policy of a DeFI artifact. Its parents are found by recorded path, or beside it, and checked by their hash."""
    moved = find_parents(folder)
    model = artifact.load(folder, "defi", {**moved, **(overrides or {})})
    return DeFIPolicy(model.to(device), execute=execute, seed=seed)


def find_parents(folder: str | Path) -> dict[str, str]:
    """Overrides that point an artifact's config at its parents, after checking that they are the ones it was trained with."""
    folder = Path(folder)
    known = artifact.meta(folder, "defi")["parents"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    overrides = {}
    for name, sha in known.items():
        recorded = Path(config[name]["path"])
        # a whole ckpts/ tree may have been moved: <tree>/defi/<run> and <tree>/gfdm/<run>
        places = [recorded, folder.resolve().parent.parent / name / recorded.name]
        place = next((p for p in places if (p / "meta.json").is_file()), None)
        if place is None:
            raise artifact.ArtifactError(f"{folder}: its {name} is neither in {places[0]} nor in {places[1]}; copy it there or train it again")
        if artifact.sha256(place) != sha:
            raise artifact.ArtifactError(f"{folder}: {place} is not the {name} that this policy was trained with (sha256 {sha[:12]} expected); "
                                         f"bring back the old one or train the policy again")
        overrides[f"{name}.path"] = str(place)
    return overrides
