"""Probes: how much of the coming motion do the features of one denoising step hold (Sec. 3.1)?

A linear probe and an MLP predict the displacement of the hand over a clip, once from the features of the forward model
and once from the latent of the present image. Both are given the sentence as well. The forward model helps a policy as
far as its features say more than the present image does.
N clips, D numbers of a clip's input, B batch, F frames, L tokens of the feature grid, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPRegressor
from torch import Tensor

from common.contracts import FutureDynamics
from common.errors import UserError
from common.image_range import normalize
from common.metrics import bootstrap_ci
from common.probe import ProbeSplit, mean_baseline_errors, probe_errors, r2_ci, ridge
from common.progress import tqdm
from step1_gfdm.dataset import VideoClips
from step1_gfdm.model import GFDM

GRID = 4  # side of the grid that the feature grid is pooled to
SPLIT = (0.6, 0.2)  # shares of the clips to fit on and to choose on; the others are the test set
MIN_CLIPS = 20


class ProbeData(NamedTuple):
    """Inputs and target of the probes."""

    inputs: dict[str, Tensor]  # "features" and "present" -> (N, D)
    displacement: Tensor  # (N, 3) in metres


@torch.no_grad()
def gather(model: GFDM, clips: VideoClips, *, count: int, batch_size: int, seed: int) -> ProbeData | None:
    """Inputs and target of up to `count` random clips; None where no annotation holds readings of the robot."""
    rng = np.random.default_rng(seed)
    device = next(model.unet.parameters()).device
    chosen = rng.permutation(len(clips))[:count]
    states = {int(index): found for index in chosen if (found := clips.states(int(index))) is not None}  # each (F, D)
    if not states:
        return None
    inputs: dict[str, list[Tensor]] = {"features": [], "present": []}
    indices = list(states)
    for start in tqdm(range(0, len(indices), batch_size), desc="probe", unit="batch"):
        items = [clips.sample(index, rng) for index in indices[start : start + batch_size]]
        first = normalize(torch.stack([item["frames"][0] for item in items]).to(device))  # (B, 3, H, W) in [-1, 1]
        text = [item["text"] for item in items]
        text_embedding = model.text.pooled(text).cpu()  # (B, CLIP's width)
        inputs["features"].append(torch.cat([_pool(model, model.imagine(first, text)), text_embedding], dim=1))
        inputs["present"].append(torch.cat([model.encode_image(first).flatten(1).cpu(), text_embedding], dim=1))
    displacement = torch.stack([torch.from_numpy(each[-1, :3] - each[0, :3]).float() for each in states.values()])
    return ProbeData({name: torch.cat(batches) for name, batches in inputs.items()}, displacement)


def _pool(model: FutureDynamics, features: Tensor) -> Tensor:
    """(B, F, L, C) -> (B, D) on the CPU: the first, middle and last frame, pooled to a grid of GRID x GRID."""
    frames = features[:, [0, model.num_frames // 2, model.num_frames - 1]].float()  # (B, 3, L, C)
    side = round(frames.shape[2] ** 0.5)
    grid = rearrange(frames, "b f (h w) c -> (b f) c h w", h=side)
    pooled = F.adaptive_avg_pool2d(grid, min(GRID, side))  # (B * 3, C, GRID, GRID)
    return rearrange(pooled, "(b f) c h w -> b (f c h w)", b=len(features)).cpu()


def fit_probes(data: ProbeData, *, seed: int = 0) -> dict[str, dict[str, tuple[float, float, float]]]:
    """R^2 with its 95 % interval over test clips: input -> "linear" or "mlp" -> (value, low, high).

    The row "difference" is the share of the variance that the features explain beyond the present image, from paired
    errors. Raises UserError for fewer than MIN_CLIPS clips.
    """
    count = len(data.displacement)
    if count < MIN_CLIPS:
        raise UserError(
            f"the probe found {count} readable clips, which is too few for a result; set probe= to {MIN_CLIPS} or more"
        )
    order = np.random.default_rng(seed).permutation(count)
    split = ProbeSplit(*np.split(order, [int(SPLIT[0] * count), int(sum(SPLIT) * count)]))
    baseline = mean_baseline_errors(data.displacement, split)
    results: dict[str, dict[str, tuple[float, float, float]]] = {}
    for kind, regressor in (("linear", ridge), ("mlp", _mlp)):
        errors = probe_errors(data.inputs, data.displacement, split, regressor, seed=seed)
        for name, values in errors.items():
            results.setdefault(name, {})[kind] = r2_ci(values, baseline)
        gain = (errors["present"] - errors["features"]) / baseline.mean()
        results.setdefault("difference", {})[kind] = bootstrap_ci(gain)
    return results


def _mlp(x: np.ndarray, y: np.ndarray, fit: np.ndarray, seed: int) -> list[np.ndarray]:
    """One hidden layer on the principal components (a common.probe.Regressor): one prediction for each weight decay."""
    pca = PCA(min(64, len(fit), x.shape[1]), whiten=True, random_state=seed).fit(x[fit])
    components, scale = pca.transform(x), y[fit].std() + 1e-9
    predictions = []
    for weight_decay in (1e-1, 1.0, 10.0):
        mlp = MLPRegressor(
            hidden_layer_sizes=(128,),
            alpha=weight_decay,
            max_iter=300,
            random_state=seed,
            early_stopping=True,
            n_iter_no_change=20,
        )
        predictions.append(mlp.fit(components[fit], y[fit] / scale).predict(components) * scale)
    return predictions
