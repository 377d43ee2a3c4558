"""What the latent actions mean: their neighbours, what of the robot's motion stands in them, what they do in another
scene (Sec. 3.2).

P pairs, K latent-action tokens, d their width, N visual tokens, E their width. Everything here lies on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.metrics import bootstrap_ci
from common.probe import ProbeSplit, mean_baseline_errors, probe_errors, r2_ci
from step2_gidm.model import InverseModel, normalize_text

CONTINUOUS, QUANTIZED = "latent action, continuous", "latent action, quantized"
# an encoder that reads the sentence hands it on: what do the frames alone give?
NO_TEXT = "latent action, continuous, sentence withheld"
TOKENS, PIXELS = "difference of DINOv2 tokens", "difference of pixels"
SENTENCE, RANDOM = "sentence alone", "random codes (dealt from other pairs)"
CONTROLS = (TOKENS, PIXELS, SENTENCE, RANDOM)
GRID, PIXEL_GRID = 4, 16  # a side, after pooling
STILL = 0.01  # m: a displacement below it has no direction
READINGS = 15  # of CALVIN's robot_obs: place (0 to 2), opening of the gripper (6)
Interval = dict[str, float]


class MissingLabels(ValueError):
    """The data lack what a part of the evaluation needs; the message says what."""


class EncodedPairs(NamedTuple):
    """Pairs as the model sees them."""

    now: Tensor  # (P, N, E)
    future: Tensor  # (P, N, E)
    continuous: Tensor  # (P, K, d)
    quantized: Tensor  # (P, K, d)
    codes: Tensor | None  # (P, K)
    no_text: Tensor | None  # (P, K, d), continuous, inferred with an empty sentence; None where the encoder reads none


class Labels(NamedTuple):
    """What pairs are known by. A set that does not say has one scene, one view and no readings."""

    text: np.ndarray  # (P,) sentences
    episode: np.ndarray  # (P,) names
    scene: np.ndarray  # (P,) names
    view: np.ndarray  # (P,)
    phase: np.ndarray  # (P,) in [0, 1]
    motion: np.ndarray  # (P, 3) m, displacement of the end effector; NaN where unknown
    gripper: np.ndarray  # (P, 1) m, change of the gripper's opening; NaN where unknown


@torch.no_grad()
def encode_pairs(model: InverseModel, pairs: Sequence[Mapping[str, Any]]) -> EncodedPairs:
    """One batch of pairs through the inverse model."""
    frames = torch.stack([pair["frames"] for pair in pairs]).to(next(model.parameters()).device)
    now, future = model.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(1)
    action = model.infer(now, future, [pair["text"] for pair in pairs])
    codes = None if action.codes is None else action.codes.cpu()
    no_text = (
        model.infer(now, future, [""] * len(pairs)).continuous.float().cpu() if "encoder" in model.text_in else None
    )
    return EncodedPairs(
        now.float().cpu(),
        future.float().cpu(),
        action.continuous.float().cpu(),
        action.quantized.float().cpu(),
        codes,
        no_text,
    )


def join(parts: Sequence[EncodedPairs]) -> EncodedPairs:
    """Batches one after another."""
    return EncodedPairs(*(None if values[0] is None else torch.cat(values) for values in zip(*parts)))


def labels(pairs: Sequence[Mapping[str, Any]]) -> Labels:
    """Labels of pairs; see Transitions(labelled=True)."""

    def column(key: str, default: Any) -> np.ndarray:
        return np.array([pair.get(key, default) for pair in pairs])

    episode = np.array([pair.get("episode", pair["id"].split("@")[0]) for pair in pairs])
    motion, gripper = np.full((len(pairs), 3), np.nan), np.full((len(pairs), 1), np.nan)
    for i, pair in enumerate(pairs):
        if (state := pair.get("state")) is not None:
            motion[i] = state[1][:3] - state[0][:3]
            if len(state[0]) == READINGS:
                gripper[i] = state[1][6] - state[0][6]
    return Labels(
        column("text", ""), episode, column("scene", ""), column("view", 0), column("phase", 0.0), motion, gripper
    )


def inputs(model: InverseModel, encoded: EncodedPairs, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What neighbours are sought in and motion is read from, each (P, D)."""
    change = (encoded.future - encoded.now).transpose(1, 2).unflatten(2, model.vision.grid)
    frames = torch.stack([pair["frames"] for pair in pairs])
    side = min(GRID, *model.vision.grid)
    no_text = {} if encoded.no_text is None else {NO_TEXT: encoded.no_text.flatten(1)}
    return {
        CONTINUOUS: encoded.continuous.flatten(1),
        QUANTIZED: encoded.quantized.flatten(1),
        **no_text,
        TOKENS: F.adaptive_avg_pool2d(change, side).flatten(1),
        PIXELS: F.adaptive_avg_pool2d(frames[:, 1] - frames[:, 0], min(PIXEL_GRID, frames.shape[-1])).flatten(1),
    }


@torch.no_grad()
def sentences(model: InverseModel, texts: Sequence[str]) -> Tensor:
    """(P, D): the mean of the text encoder's tokens, of the sentences as the model reads them."""
    tokens, mask = model.text([normalize_text(text) if model.clean_text else text for text in texts])
    return ((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).float().cpu()


def neighbours(values: Tensor, ties: Tensor, known: Labels, count: int) -> np.ndarray:
    """The nearest pair of each of the `count` nearest other episodes, seen by the same camera (P, count); -1: none.
    Neighbouring pairs of an
    episode are near twins and would be one answer given twice. Equal distances are told apart by `ties`."""
    allowed = comparable(known)
    first, second = (
        torch.cdist(x[None], x[None], compute_mode="donot_use_mm_for_euclid_dist")[0].numpy() for x in (values, ties)
    )
    found = np.full((len(allowed), count), -1)
    for i, order in enumerate(np.lexsort((second, first))):
        order = order[allowed[i, order]]
        best = order[np.sort(np.unique(known.episode[order], return_index=True)[1])][:count]
        found[i, : len(best)] = best
    return found


def comparable(known: Labels) -> np.ndarray:
    """(P, P): of another episode and the same camera."""
    return (known.episode[:, None] != known.episode) & (known.view[:, None] == known.view)


def retrieve(found: Mapping[str, np.ndarray], known: Labels) -> dict[str, Any]:
    """How alike are `neighbours` (P, count), found by each input: share with the same sentence, cosine of the
    displacements.

    By input: value and gain over the mean of all pairs that might have been found, with 95 % intervals over episodes.
    Raises Missing.
    """
    allowed = comparable(known)
    length = np.linalg.norm(known.motion, axis=1)
    direction = known.motion / np.maximum(length, 1e-9)[:, None]
    moving = allowed & (length[:, None] >= STILL) & (length >= STILL)
    same = (known.text[:, None] == known.text).astype(float)
    scales = {
        "sentence": (same, allowed, (same * allowed).any(1)),
        "displacement": (np.nan_to_num(direction) @ np.nan_to_num(direction).T, moving, moving.any(1)),
    }
    scales = {
        name: scale for name, scale in scales.items() if scale[2].any() and len(np.unique(known.episode[scale[2]])) > 1
    }
    if not scales:
        raise MissingLabels(
            "retrieval is left out: no two episodes share a sentence, and no readings of the robot tell how they moved"
        )
    results: dict[str, Any] = {name: {} for name in scales}
    for source, near in found.items():
        for name, (alike, eligible, asked) in scales.items():
            counts = (near >= 0) & np.take_along_axis(eligible, near, 1)
            asked = asked & counts.any(1)
            if not asked.any():
                continue
            value = (np.take_along_axis(alike, near, 1) * counts)[asked].sum(1) / counts[asked].sum(1)
            chance = (alike * eligible)[asked].sum(1) / eligible[asked].sum(1)
            results[name][source] = {
                "value": by_episode(value, known.episode[asked]),
                "gain": by_episode(value - chance, known.episode[asked]),
                "chance": float(chance.mean()),
                "queries": int(asked.sum()),
            }
    return results


def by_episode(values: np.ndarray, episodes: np.ndarray) -> Interval:
    """Mean with 95 % interval of values (P,): bootstrap over episodes, whose pairs are alike."""
    group = np.unique(episodes, return_inverse=True)[1]
    return dict(zip(("mean", "low", "high"), bootstrap_ci(np.bincount(group, values) / np.bincount(group))))


def split(fit: np.ndarray, test: np.ndarray, seed: int, choose: float = 0.25) -> ProbeSplit:
    """Parts of the rows [fit; test] by the names of their episodes: a share of the episodes of `fit` chooses, those of
    `test` never fit."""
    own = ~np.isin(fit, test)
    names = np.unique(fit[own])
    chosen = np.random.default_rng(seed).permutation(names)[: max(1, round(choose * len(names)))]
    choosing = np.isin(fit, chosen)
    return ProbeSplit(np.flatnonzero(own & ~choosing), np.flatnonzero(own & choosing), len(fit) + np.arange(len(test)))


def read_motion(
    fit: Mapping[str, Tensor], fit_known: Labels, test: Mapping[str, Tensor], test_known: Labels, *, seed: int
) -> dict[str, Any]:
    """Linear read-outs of the robot's motion: R^2 on held-out episodes with 95 % interval over them, by camera, target
    and input, and the
    `lead` of the continuous latent action over every control.

    Inputs wider than the latent action are cut to its number of principal components. Raises Missing.
    """
    results: dict[str, Any] = {}
    columns = fit[QUANTIZED].shape[1]
    for view in np.unique(test_known.view):
        for target in ("motion", "gripper"):
            chosen = [
                np.flatnonzero((known.view == view) & np.isfinite(getattr(known, target)).all(1))
                for known in (fit_known, test_known)
            ]
            episodes = [known.episode[rows] for known, rows in zip((fit_known, test_known), chosen)]
            parts = split(*episodes, seed)
            if min(map(len, parts)) < 10 or len(np.unique(episodes[1])) < 2:
                continue
            truth = torch.from_numpy(
                np.concatenate([getattr(known, target)[rows] for known, rows in zip((fit_known, test_known), chosen)])
            )
            scale = mean_baseline_errors(truth, parts)
            if scale.mean() < 1e-10:  # nothing moves
                continue
            x = {
                name: torch.cat([part[name][torch.from_numpy(rows)] for part, rows in zip((fit, test), chosen)])
                for name in fit
            }
            x[RANDOM] = x[QUANTIZED][torch.from_numpy(np.random.default_rng(seed).permutation(len(truth)))]
            errors = probe_errors(x, truth, parts, columns=columns, seed=seed)
            rows = {
                name: dict(zip(("mean", "low", "high"), r2_ci(values, scale, episodes[1])))
                for name, values in errors.items()
            }
            # the R^2 of such errors is the difference of two R^2: paired, as both read the same pairs
            leads = {
                name: dict(
                    zip(("mean", "low", "high"), r2_ci(scale - errors[name] + errors[CONTINUOUS], scale, episodes[1]))
                )
                for name in CONTROLS
                if name in errors
            }
            results.setdefault(str(view), {})[target] = {
                "pairs": [len(part) for part in parts],
                "r2": rows,
                "lead": leads,
            }
    if not results:
        raise MissingLabels(
            "read-outs of the robot's motion are left out: too few pairs hold readings of the robot ('state' in the "
            "annotations)"
        )
    return results


class Transfer(NamedTuple):
    """Pairs whose latent action is tried in the scene of another: each (M,) pair numbers."""

    target: np.ndarray
    source: np.ndarray  # the same sentence in another scene, at about the same part of the episode
    other: np.ndarray  # another sentence in another scene, at about the same part of the episode
    shuffled: np.ndarray  # any pair of another scene


def transfers(known: Labels, seed: int) -> Transfer:
    """Every pair that has both partners. Raises Missing."""
    if len(np.unique(known.scene)) < 2:
        raise MissingLabels("transfer is left out: all pairs are of one scene; give data.sets of several")
    rng, rows = np.random.default_rng(seed), []
    apart = (known.scene[:, None] != known.scene) & comparable(known)
    same = known.text[:, None] == known.text
    for i in range(len(known.text)):
        partners = []
        for candidates in (np.flatnonzero(apart[i] & same[i]), np.flatnonzero(apart[i] & ~same[i])):
            candidates = rng.permutation(candidates)  # equal phases: any
            partners += (
                [] if not len(candidates) else [candidates[np.abs(known.phase[candidates] - known.phase[i]).argmin()]]
            )
        if len(partners) == 2:
            rows.append((i, *partners, rng.choice(np.flatnonzero(apart[i]))))
    if len(rows) < 2:
        raise MissingLabels(
            "transfer is left out: scenes share no sentence, so that nothing says what an action should do there"
        )
    return Transfer(*np.array(rows).T)


@torch.no_grad()
def decode_transferred(
    model: InverseModel, encoded: EncodedPairs, known: Labels, target: np.ndarray, source: np.ndarray
) -> Tensor:
    """The latent actions of `source` (M,) decoded in the frames of `target` (M,) -> tokens (M, N, E)."""
    device = next(model.parameters()).device
    return (
        model.decode(encoded.now[target].to(device), encoded.quantized[source].to(device), known.text[target].tolist())
        .float()
        .cpu()
    )


def measure_transfer(
    model: InverseModel, encoded: EncodedPairs, known: Labels, pairs: Transfer, *, batch_size: int
) -> dict[str, Any]:
    """Cosine of the decoded change of tokens with the change that happened there, with 95 % intervals over episodes."""
    cosines: dict[str, list[Tensor]] = {"own": [], "same": [], "other": [], "shuffled": []}
    for start in tqdm(range(0, len(pairs.target), batch_size), desc="transfer"):
        actions = Transfer(*(rows[start : start + batch_size] for rows in pairs))
        target = actions.target
        now, truth = encoded.now[target], (encoded.future[target] - encoded.now[target]).flatten(1)
        for name, action in zip(cosines, (target, actions.source, actions.other, actions.shuffled)):
            change = (decode_transferred(model, encoded, known, target, action) - now).flatten(1)
            cosines[name].append(F.cosine_similarity(change, truth))
    values = {name: torch.cat(parts).double().numpy() for name, parts in cosines.items()}
    values |= {"gain": values["same"] - values["shuffled"], "sentence_gain": values["same"] - values["other"]}
    return {
        "pairs": len(pairs.target),
        **{name: by_episode(row, known.episode[pairs.target]) for name, row in values.items()},
    }


def nearest_frame(encoded: EncodedPairs, known: Labels, tokens: Tensor, target: int) -> tuple[int, int]:
    """(pair, moment) of the real frame of the target's scene and camera whose tokens (N, E) are nearest; its present
    frame does not count."""
    pool = np.flatnonzero((known.scene == known.scene[target]) & (known.view == known.view[target]))
    frames = torch.stack([encoded.now[pool], encoded.future[pool]], dim=1).flatten(2)  # (pool, moments, N E)
    present = (frames == encoded.now[target].flatten()).all(2)
    distances = (frames - tokens.flatten()).square().mean(2).masked_fill(present, torch.inf)
    pair, moment = divmod(int(distances.argmin()), 2)
    return int(pool[pair]), moment
