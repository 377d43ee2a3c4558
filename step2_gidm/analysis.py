"""What the latent actions carry (Sec. 3.2): their nearest neighbours, the robot's motion that linear probes read out of
them, and their effect in another scene.

P pairs, K latent-action tokens, d their width, N visual tokens, E their width. All tensors here are on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from common.metrics import bootstrap_ci
from common.probe import ProbeSplit, mean_baseline_errors, probe_errors, r2_ci
from common.progress import tqdm
from step2_gidm.model import InverseModel, normalize_text

# The representations that are compared, by the name that results.json gives them.
CONTINUOUS, QUANTIZED = "latent action, continuous", "latent action, quantized"
NO_TEXT = "latent action, continuous, sentence withheld"  # an encoder that reads the sentence may only pass it on
TOKENS, PIXELS = "difference of DINOv2 tokens", "difference of pixels"
SENTENCE, RANDOM = "sentence alone", "random codes (dealt from other pairs)"
CONTROLS = (TOKENS, PIXELS, SENTENCE, RANDOM)

TOKEN_GRID, PIXEL_GRID = 4, 16  # side of the grids to which the differences of tokens and of pixels are pooled
MIN_DISPLACEMENT = 0.01  # m; a shorter displacement of the end effector has no direction
ROBOT_OBS_DIM = 15  # of CALVIN's robot_obs: 0 to 2 are the position, 6 is the opening of the gripper
Interval = dict[str, float]  # mean, low and high: a mean with its 95 % interval


class MissingLabels(UserError):
    """The data lack what a part of the evaluation needs, so this part is left out. The message says what is missing."""


class EncodedPairs(NamedTuple):
    """Pairs of frames after the model."""

    now: Tensor  # (P, N, E)
    future: Tensor  # (P, N, E)
    continuous: Tensor  # (P, K, d)
    quantized: Tensor  # (P, K, d)
    codes: Tensor | None  # (P, K)
    no_text: Tensor | None  # (P, K, d), continuous, inferred with an empty sentence; None where the encoder reads none


class Labels(NamedTuple):
    """The labels of pairs. A set without such labels counts as one scene with one view and no readings."""

    text: np.ndarray  # (P,) sentences
    episode: np.ndarray  # (P,) names
    scene: np.ndarray  # (P,) names
    view: np.ndarray  # (P,)
    phase: np.ndarray  # (P,) position of the pair in its episode, in [0, 1]
    motion: np.ndarray  # (P, 3) m, displacement of the end effector; NaN where unknown
    gripper: np.ndarray  # (P, 1) m, change of the gripper's opening; NaN where unknown


@torch.no_grad()
def encode_batch(model: InverseModel, pairs: Sequence[Mapping[str, Any]]) -> EncodedPairs:
    """Run one batch of pairs, samples of Transitions, through the inverse model."""
    frames = torch.stack([pair["frames"] for pair in pairs]).to(next(model.parameters()).device)
    now, future = model.embed_pair(frames)
    action = model.infer(now, future, [pair["text"] for pair in pairs])
    no_text = model.infer(now, future, [""] * len(pairs)).continuous if "encoder" in model.text_in else None
    return EncodedPairs(
        now.float().cpu(),
        future.float().cpu(),
        action.continuous.float().cpu(),
        action.quantized.float().cpu(),
        None if action.codes is None else action.codes.cpu(),
        None if no_text is None else no_text.float().cpu(),
    )


def concatenate(batches: Sequence[EncodedPairs]) -> EncodedPairs:
    """Several batches as one."""
    return EncodedPairs(*(None if values[0] is None else torch.cat(values) for values in zip(*batches)))


def read_labels(pairs: Sequence[Mapping[str, Any]]) -> Labels:
    """The labels of pairs that were drawn with Transitions(labelled=True)."""

    def column(key: str, default: Any) -> np.ndarray:
        return np.array([pair.get(key, default) for pair in pairs])

    episode = np.array([pair.get("episode", pair["id"].split("@")[0]) for pair in pairs])
    motion, gripper = np.full((len(pairs), 3), np.nan), np.full((len(pairs), 1), np.nan)
    for i, pair in enumerate(pairs):
        if (state := pair.get("state")) is not None:
            motion[i] = state[1][:3] - state[0][:3]
            if len(state[0]) == ROBOT_OBS_DIM:
                gripper[i] = state[1][6] - state[0][6]
    return Labels(
        column("text", ""), episode, column("scene", ""), column("view", 0), column("phase", 0.0), motion, gripper
    )


def representations(
    model: InverseModel, encoded: EncodedPairs, pairs: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The representations of the pairs in which neighbours are searched and from which motion is read, each (P, D)."""
    rows, columns = model.vision.grid
    change = rearrange(encoded.future - encoded.now, "p (r c) e -> p e r c", r=rows, c=columns)
    frames = torch.stack([pair["frames"] for pair in pairs])  # (P, 2, 3, S, S)
    flatten = lambda x: rearrange(x, "p ... -> p (...)")
    values = {CONTINUOUS: flatten(encoded.continuous), QUANTIZED: flatten(encoded.quantized)}
    if encoded.no_text is not None:
        values[NO_TEXT] = flatten(encoded.no_text)
    pixels = frames[:, 1] - frames[:, 0]  # (P, 3, S, S)
    values[TOKENS] = flatten(F.adaptive_avg_pool2d(change, min(TOKEN_GRID, rows, columns)))
    values[PIXELS] = flatten(F.adaptive_avg_pool2d(pixels, min(PIXEL_GRID, frames.shape[-1])))
    return values


@torch.no_grad()
def embed_sentences(model: InverseModel, texts: Sequence[str]) -> Tensor:
    """(P, D): the mean of the text encoder's tokens over each sentence, in the form in which the model reads it."""
    tokens, mask = model.text([normalize_text(text) if model.clean_text else text for text in texts])
    return ((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).float().cpu()


def find_neighbours(values: Tensor, tie_breakers: Tensor, labels: Labels, count: int) -> np.ndarray:
    """The nearest pair of each of the `count` nearest other episodes, seen by the same camera: (P, count) indices.

    -1 stands where there are fewer episodes. Each episode gives one neighbour only, because its pairs resemble each
    other. `values` (P, D) define the distance; between equal distances, that of `tie_breakers` (P, D') decides.
    """
    allowed = comparable_pairs(labels)
    first, second = (
        torch.cdist(x[None], x[None], compute_mode="donot_use_mm_for_euclid_dist")[0].numpy()
        for x in (values, tie_breakers)
    )  # (P, P)
    neighbours = np.full((len(allowed), count), -1)
    for i, order in enumerate(np.lexsort((second, first))):
        order = order[allowed[i, order]]
        nearest = order[np.sort(np.unique(labels.episode[order], return_index=True)[1])][:count]
        neighbours[i, : len(nearest)] = nearest
    return neighbours


def comparable_pairs(labels: Labels) -> np.ndarray:
    """(P, P): whether two pairs are of different episodes and of the same camera."""
    return (labels.episode[:, None] != labels.episode) & (labels.view[:, None] == labels.view)


def measure_retrieval(neighbours: Mapping[str, np.ndarray], labels: Labels) -> dict[str, Any]:
    """How alike a pair and its neighbours are, for the neighbours (P, count) found by each representation.

    Likeness is measured in two ways: "sentence" is the share of neighbours with the same sentence, "displacement" the
    cosine of the displacements of the end effector. For each way and representation, `value` is the mean, and `gain` is
    the mean minus that over all pairs that might have been found, both with 95 % intervals over episodes.

    Raises MissingLabels.
    """
    allowed = comparable_pairs(labels)
    length = np.linalg.norm(labels.motion, axis=1)
    direction = labels.motion / np.maximum(length, 1e-9)[:, None]
    moving = allowed & (length[:, None] >= MIN_DISPLACEMENT) & (length >= MIN_DISPLACEMENT)
    same = (labels.text[:, None] == labels.text).astype(float)
    # way -> (likeness of two pairs (P, P), which of them count (P, P), for which pairs it can be asked (P,))
    ways = {
        "sentence": (same, allowed, (same * allowed).any(1)),
        "displacement": (np.nan_to_num(direction) @ np.nan_to_num(direction).T, moving, moving.any(1)),
    }
    ways = {name: way for name, way in ways.items() if len(np.unique(labels.episode[way[2]])) > 1}
    if not ways:
        raise MissingLabels(
            "retrieval is left out: no two episodes share a sentence, and no readings of the robot tell how they moved"
        )
    results: dict[str, Any] = {name: {} for name in ways}
    for source, near in neighbours.items():
        for name, (likeness, eligible, asked) in ways.items():
            counts = (near >= 0) & np.take_along_axis(eligible, near, 1)  # (P, count)
            asked = asked & counts.any(1)
            if not asked.any():
                continue
            value = (np.take_along_axis(likeness, near, 1) * counts)[asked].sum(1) / counts[asked].sum(1)
            chance = (likeness * eligible)[asked].sum(1) / eligible[asked].sum(1)
            results[name][source] = {
                "value": mean_over_episodes(value, labels.episode[asked]),
                "gain": mean_over_episodes(value - chance, labels.episode[asked]),
                "chance": float(chance.mean()),
                "queries": int(asked.sum()),
            }
    return results


def mean_over_episodes(values: np.ndarray, episodes: np.ndarray) -> Interval:
    """Mean and 95 % interval of values (P,), by bootstrap over episodes, since the pairs of an episode are alike."""
    group = np.unique(episodes, return_inverse=True)[1]
    return _interval(bootstrap_ci(np.bincount(group, values) / np.bincount(group)))


def _interval(values: Sequence[float]) -> Interval:
    return dict(zip(("mean", "low", "high"), values))


def split_by_episode(fit: np.ndarray, test: np.ndarray, seed: int, choose: float = 0.25) -> ProbeSplit:
    """Split the rows [fit; test] by the names of their episodes, given for each row.

    A share `choose` of the episodes of `fit` chooses the regularization. Episodes of `test` are never fitted on.
    """
    own = ~np.isin(fit, test)
    names = np.unique(fit[own])
    chosen = np.random.default_rng(seed).permutation(names)[: max(1, round(choose * len(names)))]
    choosing = np.isin(fit, chosen)
    return ProbeSplit(np.flatnonzero(own & ~choosing), np.flatnonzero(own & choosing), len(fit) + np.arange(len(test)))


def probe_motion(
    fit: Mapping[str, Tensor], fit_labels: Labels, test: Mapping[str, Tensor], test_labels: Labels, *, seed: int
) -> dict[str, Any]:
    """Linear probes of the robot's motion, fitted on `fit` and measured on `test`, each name -> (P, D).

    For each camera and target, motion or gripper: `r2` is R^2 on held-out episodes for each representation, `lead` that
    of the continuous latent action minus that of each control, both with 95 % intervals over episodes, and `pairs` the
    numbers of pairs to fit, to choose and to measure. Representations wider than the latent action are reduced to its
    width by principal components.

    Raises MissingLabels.
    """
    results: dict[str, Any] = {}
    columns = fit[QUANTIZED].shape[1]
    for view in np.unique(test_labels.view):
        for target in ("motion", "gripper"):
            sides = ((fit, fit_labels), (test, test_labels))
            rows = [
                np.flatnonzero((labels.view == view) & np.isfinite(getattr(labels, target)).all(1))
                for _, labels in sides
            ]
            episodes = [labels.episode[own] for (_, labels), own in zip(sides, rows)]
            parts = split_by_episode(*episodes, seed)
            if min(map(len, parts)) < 10 or len(np.unique(episodes[1])) < 2:
                continue
            truth = np.concatenate([getattr(labels, target)[own] for (_, labels), own in zip(sides, rows)])
            truth = torch.from_numpy(truth)  # (rows, 3 or 1)
            baseline = mean_baseline_errors(truth, parts)
            if baseline.mean() < 1e-10:  # nothing moves
                continue
            x = {
                name: torch.cat([values[name][torch.from_numpy(own)] for (values, _), own in zip(sides, rows)])
                for name in fit
            }
            x[RANDOM] = x[QUANTIZED][torch.from_numpy(np.random.default_rng(seed).permutation(len(truth)))]
            errors = probe_errors(x, truth, parts, columns=columns, seed=seed)
            r2 = {name: _interval(r2_ci(values, baseline, episodes[1])) for name, values in errors.items()}
            # R^2 of these errors is the difference of two R^2. It is paired, since both are measured on the same pairs.
            lead = {
                name: _interval(r2_ci(baseline - errors[name] + errors[CONTINUOUS], baseline, episodes[1]))
                for name in CONTROLS
                if name in errors
            }
            found = {"pairs": [len(part) for part in parts], "r2": r2, "lead": lead}
            results.setdefault(str(view), {})[target] = found
    if not results:
        raise MissingLabels(
            "probes of the robot's motion are left out: too few pairs hold readings of the robot ('state' in the "
            "annotations)"
        )
    return results


class TransferPairs(NamedTuple):
    """Pairs whose latent action is applied in the scene of another pair: indices of pairs, each (M,)."""

    target: np.ndarray
    source: np.ndarray  # the same sentence in another scene, at about the same phase of the episode
    other: np.ndarray  # another sentence in another scene, at about the same phase
    shuffled: np.ndarray  # any pair of another scene


def find_transfer_pairs(labels: Labels, seed: int) -> TransferPairs:
    """Every pair for which there are a source with the same sentence and one with another. Raises MissingLabels."""
    if len(np.unique(labels.scene)) < 2:
        raise MissingLabels("transfer is left out: all pairs are of one scene; give data.sets of several")
    rng, rows = np.random.default_rng(seed), []
    elsewhere = (labels.scene[:, None] != labels.scene) & comparable_pairs(labels)
    same = labels.text[:, None] == labels.text
    for i in range(len(labels.text)):
        sources = []
        for candidates in (np.flatnonzero(elsewhere[i] & same[i]), np.flatnonzero(elsewhere[i] & ~same[i])):
            candidates = rng.permutation(candidates)  # among equal phases, any
            if len(candidates):
                sources.append(candidates[np.abs(labels.phase[candidates] - labels.phase[i]).argmin()])
        if len(sources) == 2:
            rows.append((i, *sources, rng.choice(np.flatnonzero(elsewhere[i]))))
    if len(rows) < 2:
        raise MissingLabels(
            "transfer is left out: scenes share no sentence, so that nothing says what an action should do there"
        )
    return TransferPairs(*np.array(rows).T)


@torch.no_grad()
def decode_transferred(
    model: InverseModel, encoded: EncodedPairs, labels: Labels, target: np.ndarray, source: np.ndarray
) -> Tensor:
    """The latent actions of pairs `source` (M,), decoded in the present frames of pairs `target` (M,): (M, N, E)."""
    device = next(model.parameters()).device
    now, action = encoded.now[target].to(device), encoded.quantized[source].to(device)
    return model.decode(now, action, labels.text[target].tolist()).float().cpu()


def measure_transfer(
    model: InverseModel, encoded: EncodedPairs, labels: Labels, pairs: TransferPairs, *, batch_size: int
) -> dict[str, Any]:
    """Cosine of the decoded change of the tokens with the true change, with 95 % intervals over episodes.

    It is given for the pair's own latent action and for those of `pairs`, and as differences: `gain` is same minus
    shuffled, `sentence_gain` is same minus other.
    """
    cosines: dict[str, list[Tensor]] = {"own": [], "same": [], "other": [], "shuffled": []}
    for start in tqdm(range(0, len(pairs.target), batch_size), desc="transfer"):
        batch = TransferPairs(*(indices[start : start + batch_size] for indices in pairs))
        target = batch.target
        now, truth = encoded.now[target], (encoded.future[target] - encoded.now[target]).flatten(1)
        for name, source in zip(cosines, (target, batch.source, batch.other, batch.shuffled)):
            change = (decode_transferred(model, encoded, labels, target, source) - now).flatten(1)
            cosines[name].append(F.cosine_similarity(change, truth))
    values = {name: torch.cat(parts).double().numpy() for name, parts in cosines.items()}
    values |= {"gain": values["same"] - values["shuffled"], "sentence_gain": values["same"] - values["other"]}
    episodes = labels.episode[pairs.target]
    return {
        "pairs": len(pairs.target),
        **{name: mean_over_episodes(cosine, episodes) for name, cosine in values.items()},
    }


def nearest_frame(encoded: EncodedPairs, labels: Labels, tokens: Tensor, target: int) -> tuple[int, int]:
    """(pair, moment) of the real frame whose tokens are nearest to `tokens` (N, E), moment 0 being the present.

    Frames of the scene and camera of the pair `target` are searched, except its present frame.
    """
    pool = np.flatnonzero((labels.scene == labels.scene[target]) & (labels.view == labels.view[target]))
    frames = torch.stack([encoded.now[pool], encoded.future[pool]], dim=1).flatten(2)  # (pool, 2, N E)
    present = (frames == encoded.now[target].flatten()).all(2)
    distances = (frames - tokens.flatten()).square().mean(2).masked_fill(present, torch.inf)  # (pool, 2)
    pair, moment = divmod(int(distances.argmin()), 2)
    return int(pool[pair]), moment
