"""Probes: how well a target can be predicted from a feature vector, measured on held-out samples (Secs. 3.1 and 3.2).

N samples (clips, pairs of frames), D features of a sample, Y numbers of its target, T samples of the test part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge penalty, multiplied by the number of columns
# features (N, D), target (N, Y), indices of the samples to fit on, seed -> predictions (N, Y), one per strength
Regressor = Callable[[np.ndarray, np.ndarray, np.ndarray, int], list[np.ndarray]]


class ProbeSplit(NamedTuple):
    """Indices of the samples to fit on, to choose the strength by, and to measure."""

    fit: np.ndarray
    choose: np.ndarray
    test: np.ndarray


def ridge(x: np.ndarray, y: np.ndarray, fit: np.ndarray, seed: int) -> list[np.ndarray]:
    """Ridge regression with every strength; a Regressor."""
    return [Ridge(alpha=strength * x.shape[1]).fit(x[fit], y[fit]).predict(x) for strength in STRENGTHS]


def probe_errors(
    inputs: Mapping[str, Tensor],
    target: Tensor,
    parts: ProbeSplit,
    reader: Regressor = ridge,
    *,
    columns: int | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Squared errors (T,) of predicting `target` (N, Y) from each of `inputs`, name -> (N, D).

    Every column is standardised on the samples to fit on. With `columns` all columns of an input share one scale
    instead, and a wider input is reduced to that many principal components: a column that is constant there, such as a
    corner of a picture, would otherwise become huge on the test part. Raises ValueError where parts share samples.
    """
    if len(np.unique(np.concatenate(parts))) < sum(map(len, parts)):
        raise ValueError("the parts of a probe share samples; what is measured must not be fitted on")
    fit, choose, test = parts
    truth, errors = target.double().numpy(), {}
    for name, x in ((name, values.double().numpy()) for name, values in inputs.items()):
        x = (
            StandardScaler().fit(x[fit]).transform(x)
            if columns is None
            else (x - x[fit].mean(0)) / max(1e-12, np.sqrt(x[fit].var(0).mean()))
        )
        if columns is not None and x.shape[1] > columns:
            x = PCA(min(columns, len(fit)), random_state=seed).fit(x[fit]).transform(x)
        # scikit-learn may drop the axis of a target of one number
        predictions = (prediction.reshape(truth.shape) for prediction in reader(x, truth, fit, seed))
        best = min(predictions, key=lambda prediction: np.square(prediction[choose] - truth[choose]).mean())
        errors[name] = np.square(best[test] - truth[test]).sum(1)
    return errors


def mean_baseline_errors(target: Tensor, parts: ProbeSplit) -> np.ndarray:
    """Squared errors (T,) of predicting the mean of the samples to fit on, the baseline of R^2."""
    truth = target.double().numpy()
    return np.square(truth[parts.test] - truth[parts.fit].mean(0)).sum(1)


def r2_ci(
    errors: np.ndarray, mean_baseline_errors: np.ndarray, groups: Sequence[str] | None = None, *, resamples: int = 2000
) -> tuple[float, float, float]:
    """(R^2, low, high) with a 95 % bootstrap interval over samples.

    groups: T names; where given, whole groups are resampled, because samples of one group are not independent.
    """
    if groups is not None:
        group = np.unique(np.asarray(groups), return_inverse=True)[1]
        errors, mean_baseline_errors = np.bincount(group, errors), np.bincount(group, mean_baseline_errors)
    draws = np.random.default_rng(0).integers(len(errors), size=(resamples, len(errors)))
    sampled = 1 - errors[draws].mean(1) / mean_baseline_errors[draws].mean(1)
    low, high = np.quantile(sampled, [0.025, 0.975])
    return float(1 - errors.mean() / mean_baseline_errors.mean()), float(low), float(high)
