"""A DeFI artifact at work: pictures in, commands out, the chunk carried out before the next look (Sec. 3.4)."""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from common import artifact
from common.calvin_format import KEYS
from common.frozen import text_encoders
from common.video import resize
from step3_defi.model import DeFI

log = logging.getLogger(__name__)
PARENTS = ("gfdm", "gidm")
PARENTS_DIR = "parents"  # where a policy's folder may hold them, so that it is whole; one of artifact.BESIDE
BEST = "best"  # where a policy's folder holds it as it was at its best validation; one of artifact.BESIDE


class DeFIPolicy:
    """contracts.ChunkPolicy over a DeFI model, and a single robot's `reset` and `act`.

    The first `execute` actions of a chunk are carried out. The noise of a plan comes from `seed` and obs["rollout_key"]
    (seed,
    sequence, sub-task, plan) where a rollout gives it, else the robot's state, so that a plan depends neither on the
    batch that
    it is made in nor on the plans before it.
    """

    def __init__(self, model: DeFI, *, execute: int = 10, seed: int = 0) -> None:
        if not 1 <= execute <= model.adapter.horizon:
            raise ValueError(f"execute={execute}: the policy plans {model.adapter.horizon} actions")
        self.model, self.execute, self.seed = model.eval(), execute, seed
        self.origin: Path | None = None  # the artifact it came from, and where its parents were
        self.moved: dict[str, str] = {}
        self._understood: set[str] = set()
        self.reset()

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> DeFIPolicy:
        """A folder or a hub id -> the policy; options as of `load`."""
        return load(source, **options)

    def save_pretrained(self, folder: str | Path, *, with_parents: bool = True) -> Path:
        """Write the policy as an artifact that from_pretrained opens anywhere, its weights as they are now.

        Forward and inverse models come along in `parents/` (some GB at full scale) unless `with_parents` is false; the
        frozen
        CLIP, T5, DINOv2 and SVD stay named by their paths. ValueError: the policy did not come from an artifact.
        """
        if self.origin is None:
            raise ValueError(
                "this policy was not loaded from an artifact, so nothing says how to build it; see common.artifact.save"
            )
        folder = Path(folder)
        record = artifact.read_meta(self.origin, "defi")
        config = artifact.read_config(self.origin, "defi")
        for key, place in self.moved.items() if with_parents else ():
            artifact.copy(place, folder / PARENTS_DIR / key.removesuffix(".path"))
        return artifact.save(
            self.model,
            folder,
            kind="defi",
            config=config,
            step=record["step"],
            scale=record.get("scale"),
            parents=record["parents"],
            stats=record["stats"],
        )

    def plan(self, observations: list[dict], instructions: list[str]) -> np.ndarray:
        """CALVIN observations and a sentence each -> (B, A, 7) float32 actions, the gripper's exactly -1 or 1.

        The others may leave [-1, 1]: `act` clips, and a rollout clips and counts. ValueError: an observation or a
        sentence that the
        policy was not made for.
        """
        if not 0 < len(observations) == len(instructions):
            raise ValueError(
                f"{len(observations)} observations and {len(instructions)} instructions: a plan needs one sentence each"
            )
        self._check_instructions(instructions)
        views = {view: self._images(observations, KEYS[view]).to(self.model.device) for view in self.model.views}
        seeds = [self._noise_seed(o) for o in observations]
        actions = self.model.sample(views, list(instructions), seed=seeds).float().cpu().numpy()
        actions[..., 6] = np.where(actions[..., 6] > 0, 1.0, -1.0)
        return actions

    def reset(self) -> None:
        """Forget the chunk."""
        self._chunk: deque[np.ndarray] = deque()
        self._instruction: str | None = None

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The next (7,) action in [-1, 1]. A new instruction drops what was left of the chunk."""
        if instruction != self._instruction or not self._chunk:
            self._chunk = deque(self.plan([observation], [instruction])[0, : self.execute].clip(-1, 1))
            self._instruction = instruction
        return self._chunk.popleft()

    def _noise_seed(self, observation: dict) -> int:
        if "rollout_key" in observation:
            return int(np.random.SeedSequence((self.seed, *observation["rollout_key"])).generate_state(1)[0] >> 1)
        state = np.asarray(observation.get("robot_obs", np.nan), np.float64)
        if not np.isfinite(state).all():
            raise ValueError(
                f"{_named(observation)}: robot_obs is missing or not finite, and the noise of a plan comes from it; "
                "give CALVIN's 15 numbers"
            )
        return (self.seed + zlib.crc32(state.tobytes())) % 2**31

    def _images(self, observations: list[dict], key: str) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        for observation in observations:
            picture = observation.get("rgb_obs", {}).get(key)
            if picture is None:
                raise ValueError(
                    f"{_named(observation)} has no rgb_obs/{key}; the policy looks through {list(self.model.views)}"
                )
            if (
                not isinstance(picture, np.ndarray)
                or picture.dtype != np.uint8
                or picture.ndim != 3
                or picture.shape[2] != 3
                or not picture.size
            ):
                said = (
                    f"{picture.dtype} of shape {picture.shape}"
                    if isinstance(picture, np.ndarray)
                    else f"a {type(picture).__name__}"
                )
                raise ValueError(
                    f"{_named(observation)}: rgb_obs/{key} is {said}; give the camera's uint8 picture of shape (H, W, "
                    "3)"
                )
        return resize(np.stack([o["rgb_obs"][key] for o in observations]), self.model.image_size) * 2 - 1

    def _check_instructions(self, instructions: list[str]) -> None:
        for text in set(instructions) - self._understood:
            if not text.strip():
                raise ValueError(
                    f"instruction {text!r}: there is nothing in it; say what to do, as in 'open the drawer'"
                )
            if strange := sorted(set().union(*(encoder.unknown(text) for encoder in text_encoders(self.model)))):
                raise ValueError(
                    f"instruction {text!r}: the policy's text encoders do not know {', '.join(map(repr, strange))}; "
                    "say it in plain English"
                )
            self._understood.add(text)


def _named(observation: dict) -> str:
    """Which one, where a rollout says."""
    key = observation.get("rollout_key")
    return "the observation" if key is None else "the observation of sequence {1}, sub-task {2}, plan {3}".format(*key)


def load(
    source: str | Path,
    *,
    execute: int = 10,
    seed: int = 0,
    device: str | torch.device = "cpu",
    overrides: dict[str, Any] | None = None,
    gfdm: str | Path | None = None,
    gidm: str | Path | None = None,
    compile: bool = False,
) -> DeFIPolicy:
    """The policy of a DeFI artifact, a folder or a hub id.

    Its parents are found where `gfdm` and `gidm` say (folders or hub ids), else inside it, by recorded path, or beside
    it, and
    checked by their hash. `overrides` are keys of its config, for instance {"goal.path":
    "openai/clip-vit-base-patch32"}.
    `compile` makes the first plan of every batch size minutes slower and those after it faster, and actions equal to
    rounding.
    """
    folder = resolve_source(source)
    given = {name: resolve_source(place) for name, place in (("gfdm", gfdm), ("gidm", gidm)) if place is not None}
    moved = find_parents(folder, given)
    model = artifact.load(folder, "defi", {**moved, **(overrides or {})})
    policy = DeFIPolicy(model.to(device), execute=execute, seed=seed)
    if compile:
        model.compile_parts(**compile_options(model.device))
    policy.origin, policy.moved = folder, moved
    return policy


def compile_options(device: torch.device) -> dict[str, Any]:
    """torch.compile's for plans: a rollout's batches keep their size, and a GPU replays CUDA graphs."""
    return {"dynamic": False, "mode": "reduce-overhead" if device.type == "cuda" else None}


def resolve_source(source: str | Path) -> Path:
    """An artifact's folder: `source` itself, or the download of a hub id such as user/policy."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source)))
    except (
        HFValidationError,
        OSError,
    ) as error:  # OSError: what huggingface_hub raises of a hub that is away or knows no such id
        reason = str(error).strip().splitlines()[0]
        raise artifact.ArtifactError(
            f"{source}: neither a folder nor a hub id that can be fetched ({reason})"
        ) from error


def parents(config: dict[str, Any]) -> dict[str, str]:
    """Part -> sha256 of the artifact that it comes from; parts built from scratch have none."""
    return {name: artifact.sha256(config[name]["path"]) for name in PARENTS if is_artifact(config[name])}


def check_scale(config: dict[str, Any], scale: str) -> None:
    """Refuse parents that are artifacts of another scale than this policy's."""
    for name in PARENTS:
        if is_artifact(config[name]):
            artifact.check_scale(config[name]["path"], name, scale)


def is_artifact(config: dict[str, Any]) -> bool:
    """Whether a part is loaded from an artifact, and not built from scratch."""
    return config["_target_"] == "common.artifact.load"


def find_parents(folder: str | Path, given: Mapping[str, Path] | None = None) -> dict[str, str]:
    """Overrides that point an artifact's config at its parents, after checking that they are the ones it was trained
    with."""
    folder, given = Path(folder), given or {}
    known = artifact.read_meta(folder, "defi")["parents"]
    config = artifact.read_config(folder, "defi")
    if strangers := sorted(given.keys() - known.keys()):
        raise artifact.ArtifactError(
            f"{folder}: its {' and '.join(strangers)} is no artifact and cannot be given; "
            f"it is built from its own config: override {strangers[0]}.<key>"
        )
    overrides = {}
    for name, sha in known.items():
        recorded = Path(config[name]["path"])
        # a whole ckpts/ tree may have been moved: <tree>/defi/<run> and <tree>/gfdm/<run>
        run = folder.resolve().parent if folder.name == BEST else folder.resolve()
        beside = run.parent.parent / name / recorded.name
        places = [given[name]] if name in given else [folder / PARENTS_DIR / name, recorded, beside]
        place = next((p for p in places if (p / "meta.json").is_file()), None)
        if place is None:
            raise artifact.ArtifactError(
                f"{folder}: its {name} is neither in {recorded} nor in {beside}; copy it there or train it again"
                if name not in given
                else f"{given[name]}: no artifact here (meta.json is missing), so no {name}"
            )
        if artifact.sha256(place) != sha:
            raise artifact.ArtifactError(
                f"{folder}: {place} is not the {name} that this policy was trained with (sha256 {sha[:12]} expected); "
                f"bring back the old one or train the policy again"
            )
        overrides[f"{name}.path"] = str(place)
    return overrides
