"""How much of the coming motion stands in one-step features? Read-outs of the hand's displacement over the clip (Sec.
3.1).

The forward model is worth its cost to a policy as far as its features say more than the present picture does. Both
read-outs are
given the sentence. N clips, D numbers of a clip.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPRegressor
from torch import Tensor
from tqdm import tqdm

from common.contracts import FutureDynamics
from common.metrics import bootstrap_ci
from common.probe import ProbeSplit, mean_baseline_errors, probe_errors, r2_ci, ridge
from step1_gfdm.dataset import VideoClips
from step1_gfdm.model import GFDM

GRID = 4  # tokens a side after pooling
SPLIT = (0.6, 0.2)  # fit, choose; the rest is measured


class ProbeData(NamedTuple):
    """Inputs and target of the read-outs."""

    inputs: dict[str, Tensor]  # name -> (N, D)
    displacement: Tensor  # (N, 3) m


@torch.no_grad()
def gather(model: GFDM, clips: VideoClips, *, count: int, batch_size: int, seed: int) -> ProbeData | None:
    """Inputs of `count` clips of different videos as far as they go; None where annotations hold no readings of the
    robot."""
    rng = np.random.default_rng(seed)
    device = next(model.unet.parameters()).device
    chosen = rng.permutation(len(clips))[:count]
    moved = {int(index): states for index in chosen if (states := clips.states(int(index))) is not None}
    if not moved:
        return None
    inputs: dict[str, list[Tensor]] = {"features": [], "present": []}
    indices = list(moved)
    for start in tqdm(range(0, len(indices), batch_size), desc="probe", unit="batch"):
        items = [clips.sample(index, rng) for index in indices[start : start + batch_size]]
        first = torch.stack([item["frames"][0] for item in items]).to(device) * 2 - 1
        text = [item["text"] for item in items]
        told = model.text.pooled(text).cpu()
        inputs["features"].append(torch.cat([_pooled(model, model.imagine(first, text)), told], dim=1))
        inputs["present"].append(torch.cat([model.encode_image(first).flatten(1).cpu(), told], dim=1))
    displacement = torch.stack([torch.from_numpy(states[-1, :3] - states[0, :3]).float() for states in moved.values()])
    return ProbeData({name: torch.cat(parts) for name, parts in inputs.items()}, displacement)


def _pooled(model: FutureDynamics, features: Tensor) -> Tensor:
    """(B, F, L, C) -> first, middle and last frame on a coarse grid, (B, D) on the CPU."""
    frames = features[:, [0, model.num_frames // 2, model.num_frames - 1]].float()
    side = round(frames.shape[2] ** 0.5)
    grid = frames.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(grid, min(GRID, side)).flatten(1).unflatten(0, (len(features), -1)).flatten(1).cpu()


def fit_probes(read: ProbeData, *, seed: int = 0) -> dict[str, dict[str, tuple[float, float, float]]]:
    """R^2 with 95 % interval over clips, by input and kind of read-out, on clips that neither fitting nor choosing saw.

    "difference" is that of the paired errors, features against present.
    """
    count = len(read.displacement)
    if count < 20:
        raise ValueError(f"a probe of {count} clips says nothing; give probe= at least 20 readable ones")
    order = np.random.default_rng(seed).permutation(count)
    parts = ProbeSplit(*np.split(order, [int(SPLIT[0] * count), int(sum(SPLIT) * count)]))
    scale = mean_baseline_errors(read.displacement, parts)
    results: dict[str, dict[str, tuple[float, float, float]]] = {}
    for kind, reader in (("linear", ridge), ("mlp", _mlp)):
        errors = probe_errors(read.inputs, read.displacement, parts, reader, seed=seed)
        for name, values in errors.items():
            results.setdefault(name, {})[kind] = r2_ci(values, scale)
        results.setdefault("difference", {})[kind] = bootstrap_ci(
            (errors["present"] - errors["features"]) / scale.mean()
        )
    return results


def _mlp(x: np.ndarray, y: np.ndarray, fit: np.ndarray, seed: int) -> list[np.ndarray]:
    """One hidden layer on the principal components, with every weight decay."""
    parts = PCA(min(64, len(fit), x.shape[1]), whiten=True, random_state=seed).fit(x[fit])
    z, scale = parts.transform(x), y[fit].std() + 1e-9
    guesses = []
    for decay in (1e-1, 1.0, 10.0):
        net = MLPRegressor(
            hidden_layer_sizes=(128,),
            alpha=decay,
            max_iter=300,
            random_state=seed,
            early_stopping=True,
            n_iter_no_change=20,
        )
        guesses.append(net.fit(z[fit], y[fit] / scale).predict(z) * scale)
    return guesses
