"""A DeFI artifact in use: pictures and a sentence in, robot commands out, one chunk per look (Sec. 3.4)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from common import artifact
from common.calvin_format import KEYS
from common.errors import UserError
from common.frozen import text_encoders
from common.image_range import normalize
from common.video import resize
from step3_defi.action_chunk import ActionChunkBroker, RolloutKey
from step3_defi.model import DeFI

PARENTS = ("gfdm", "gidm")
PARENTS_DIR = "parents"  # folder inside a policy's folder that may hold its two models, so that it is complete
BEST = "best"  # folder inside a policy's folder that holds the policy of its best validation

artifact.register_kind("defi", made_by="scripts/step3_train_calvin.sh")


class DeFIPolicy:
    """A contracts.ChunkPolicy over a DeFI model; `reset` and `act` control a single robot.

    The first `execute` actions of a chunk are carried out before the policy looks again. The noise of a plan comes from
    `seed` and its rollout key, where a rollout gives one, else from `seed` and the robot's state. A plan therefore
    depends neither on the batch that it is made in nor on the plans before it.
    """

    def __init__(self, model: DeFI, *, execute: int = 10, seed: int = 0) -> None:
        if not 1 <= execute <= model.adapter.action_horizon:
            raise UserError(
                f"execute={execute}: the policy plans {model.adapter.action_horizon} actions; choose 1 to "
                f"{model.adapter.action_horizon}"
            )
        self.model, self.execute, self.seed = model.eval(), execute, seed
        self.origin: Path | None = None  # the artifact that the policy was loaded from
        self.parent_overrides: dict[str, str] = {}  # where its two models were, as overrides of its config
        self._known_instructions: set[str] = set()
        self._broker = ActionChunkBroker(self._predict_one)
        self.reset()

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> DeFIPolicy:
        """The policy of a folder or of a hub id; `options` are those of `load`."""
        return load(source, **options)

    def save_pretrained(self, folder: str | Path, *, with_parents: bool = True) -> Path:
        """Write the policy, with its weights as they are now, as an artifact that from_pretrained opens anywhere.

        The forward and the inverse model are copied to `parents/` in it (some GB at full scale), unless `with_parents`
        is false. The frozen CLIP, T5, DINOv2 and SVD are still named by their paths. Raises UserError if the policy was
        not loaded from an artifact.
        """
        if self.origin is None:
            raise UserError(
                "this policy was not loaded from an artifact, so nothing says how to build it; write it with "
                "common.artifact.save"
            )
        folder = Path(folder)
        record = artifact.read_meta(self.origin, "defi")
        config = artifact.read_config(self.origin, "defi")
        if with_parents:
            for key, place in self.parent_overrides.items():
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

    def predict_action_chunk(
        self,
        observations: list[dict],
        instructions: list[str],
        *,
        rollout_keys: Sequence[RolloutKey] | None = None,
    ) -> np.ndarray:
        """Observations of CALVIN and a sentence for each -> (B, A, 7) float32 actions, the gripper's exactly -1 or 1.

        The other entries may leave [-1, 1]: `act` clips them, and a rollout clips and counts them. `rollout_keys` are
        those of contracts.ChunkPolicy. Raises UserError for an observation or a sentence that the policy cannot read.
        """
        if not 0 < len(observations) == len(instructions):
            raise UserError(
                f"{len(observations)} observations and {len(instructions)} instructions: a plan needs one sentence for "
                "each observation"
            )
        self._check_instructions(instructions)
        keys = rollout_keys or [None] * len(observations)
        views = {view: self._images(observations, KEYS[view], keys).to(self.model.device) for view in self.model.views}
        seeds = [self._noise_seed(observation, key) for observation, key in zip(observations, keys)]
        actions = self.model.sample(views, list(instructions), seed=seeds).float().cpu().numpy()
        actions[..., 6] = np.where(actions[..., 6] > 0, 1.0, -1.0)
        return actions

    def reset(self) -> None:
        """Drop the actions that are left of the last chunk."""
        self._broker.reset()
        self._instruction: str | None = None

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The next (7,) action in [-1, 1]. A new instruction drops what is left of the chunk."""
        if instruction != self._instruction:
            self._broker.reset()
            self._instruction = instruction
        return self._broker.next_action(observation, instruction)

    def _predict_one(self, observation: dict, instruction: str) -> np.ndarray:
        """The (execute, 7) actions to carry out, in [-1, 1]."""
        return self.predict_action_chunk([observation], [instruction])[0, : self.execute].clip(-1, 1)

    def _noise_seed(self, observation: dict, key: RolloutKey | None) -> int:
        if key is not None:
            return int(np.random.SeedSequence((self.seed, *key)).generate_state(1)[0] >> 1)
        state = np.asarray(observation.get("robot_obs", np.nan), np.float64)
        if not np.isfinite(state).all():
            raise UserError(
                f"{_describe(key)}: robot_obs is missing or not finite, and the noise of a plan is derived from it; "
                "give the 15 numbers of CALVIN"
            )
        return (self.seed + zlib.crc32(state.tobytes())) % 2**31

    def _images(self, observations: list[dict], camera: str, keys: Sequence[RolloutKey | None]) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        for observation, key in zip(observations, keys):
            self._check_picture(observation.get("rgb_obs", {}).get(camera), camera, key)
        pictures = np.stack([observation["rgb_obs"][camera] for observation in observations])
        return normalize(resize(pictures, self.model.image_size))

    def _check_picture(self, picture: Any, camera: str, key: RolloutKey | None) -> None:
        if picture is None:
            raise UserError(
                f"{_describe(key)} has no rgb_obs/{camera}; the policy reads the views {list(self.model.views)}"
            )
        if isinstance(picture, np.ndarray):
            valid = picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size
            found = f"{picture.dtype} of shape {picture.shape}"
        else:
            valid, found = False, f"a {type(picture).__name__}"
        if not valid:
            raise UserError(
                f"{_describe(key)}: rgb_obs/{camera} is {found}; give the camera's uint8 picture of shape (H, W, 3)"
            )

    def _check_instructions(self, instructions: list[str]) -> None:
        for text in set(instructions) - self._known_instructions:
            if not text.strip():
                raise UserError(f"instruction {text!r} is empty; say what to do, as in 'open the drawer'")
            unknown = set().union(*(encoder.unknown(text) for encoder in text_encoders(self.model)))
            if unknown:
                raise UserError(
                    f"instruction {text!r}: the policy's text encoders do not know "
                    f"{', '.join(map(repr, sorted(unknown)))}; write it in plain English"
                )
            self._known_instructions.add(text)


def _describe(key: RolloutKey | None) -> str:
    """Names an observation in an error message, by its rollout key where it has one."""
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
    """The policy of a DeFI artifact, which is a folder or a hub id.

    Its two models are taken from `gfdm` and `gidm` (folders or hub ids) where these are given, else from its folder,
    the recorded path, or the neighbouring folder, and their hashes are checked. `overrides` replace values of its
    config, for instance {"goal.path": "openai/clip-vit-base-patch32"}. `compile` makes the first plan of every batch
    size minutes slower and later plans faster; actions then differ by rounding.
    """
    folder = resolve_source(source)
    given = {name: resolve_source(place) for name, place in (("gfdm", gfdm), ("gidm", gidm)) if place is not None}
    parent_overrides = find_parents(folder, given)
    model = artifact.load(folder, "defi", {**parent_overrides, **(overrides or {})})
    policy = DeFIPolicy(model.to(device), execute=execute, seed=seed)
    if compile:
        model.compile_parts(**compile_options(model.device))
    policy.origin, policy.parent_overrides = folder, parent_overrides
    return policy


def compile_options(device: torch.device) -> dict[str, Any]:
    """Options of torch.compile for plans: batches of a rollout keep their size, and a GPU replays CUDA graphs."""
    return {"dynamic": False, "mode": "reduce-overhead" if device.type == "cuda" else None}


def resolve_source(source: str | Path) -> Path:
    """The folder of an artifact: `source` itself, or the download of a hub id such as user/policy."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source)))
    except (HFValidationError, OSError) as error:  # huggingface_hub raises OSError when it cannot reach or find the id
        reason = str(error).strip().splitlines()[0]
        raise artifact.ArtifactError(
            f"{source}: neither a folder nor a hub id that can be fetched ({reason})"
        ) from error


def parent_hashes(config: dict[str, Any]) -> dict[str, str]:
    """Part -> sha256 of the artifact that it is loaded from; a part that is built from scratch has none."""
    return {name: artifact.sha256(config[name]["path"]) for name in PARENTS if is_artifact(config[name])}


def check_scale(config: dict[str, Any], scale: str) -> None:
    """Refuse models that are artifacts of another scale than the policy's."""
    for name in PARENTS:
        if is_artifact(config[name]):
            artifact.check_scale(config[name]["path"], name, scale)


def is_artifact(config: dict[str, Any]) -> bool:
    """Whether a part is loaded from an artifact, and not built from scratch."""
    return config["_target_"] == "common.artifact.load"


def find_parents(folder: str | Path, given: Mapping[str, Path] | None = None) -> dict[str, str]:
    """Overrides that point the config of a policy's artifact at its two models, once their hashes are checked."""
    folder, given = Path(folder), given or {}
    hashes = artifact.read_meta(folder, "defi")["parents"]
    config = artifact.read_config(folder, "defi")
    if unexpected := sorted(given.keys() - hashes.keys()):
        raise artifact.ArtifactError(
            f"{folder}: its {' and '.join(unexpected)} is not loaded from an artifact, so none can be given; it is "
            f"built from its own config: override {unexpected[0]}.<key>"
        )
    overrides = {}
    for name, sha in hashes.items():
        place = _find_parent(folder, name, Path(config[name]["path"]), given.get(name))
        if artifact.sha256(place) != sha:
            raise artifact.ArtifactError(
                f"{folder}: {place} is not the {name} that this policy was trained with (sha256 {sha[:12]} expected); "
                "bring back the old one, or train the policy again"
            )
        overrides[f"{name}.path"] = str(place)
    return overrides


def _find_parent(folder: Path, name: str, recorded: Path, given: Path | None) -> Path:
    """The folder of a policy's model `name`: `given`, or the first that exists of three places."""
    if given is not None:
        if not (given / "meta.json").is_file():
            raise artifact.ArtifactError(f"{given}: no artifact here (meta.json is missing), so no {name}")
        return given
    # A whole ckpts/ tree may have been moved: then <tree>/defi/<run> has <tree>/gfdm/<run> as its neighbour.
    run = folder.resolve().parent if folder.name == BEST else folder.resolve()
    neighbour = run.parent.parent / name / recorded.name
    for place in (folder / PARENTS_DIR / name, recorded, neighbour):
        if (place / "meta.json").is_file():
            return place
    raise artifact.ArtifactError(
        f"{folder}: its {name} is neither in {recorded} nor in {neighbour}; copy it there, or train it again"
    )
