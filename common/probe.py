"""Read-outs: how much of a target stands in a vector, told on units that neither fitting nor choosing saw (Secs. 3.1
and 3.2).

N units (clips, pairs of frames), D numbers of a unit, Y numbers of its target, T units of the test part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge, times the number of columns
Regressor = Callable[
    [np.ndarray, np.ndarray, np.ndarray, int], list[np.ndarray]
]  # (N, D), (N, Y), units to fit on, seed -> guesses (N, Y)


class ProbeSplit(NamedTuple):
    """Numbers of the units to fit on, to choose the strength by, and to measure."""

    fit: np.ndarray
    choose: np.ndarray
    test: np.ndarray


def ridge(x: np.ndarray, y: np.ndarray, fit: np.ndarray, seed: int) -> list[np.ndarray]:
    """Ridge regression of every strength."""
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
    """Squared errors (T,) of reading `target` (N, Y) out of each input (N, D). Raises ValueError where parts share
    units.

    Columns are brought to deviation 1. With `columns`, inputs keep the proportions of theirs (what is still while
    fitting, as a
    corner of a picture, would else explode when measured), and wider ones are cut to so many principal components of
    the fitted part.
    """
    if len(np.unique(np.concatenate(parts))) < sum(map(len, parts)):
        raise ValueError("the parts of a probe share units; what is measured must not be fitted on")
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
        guesses = (
            guess.reshape(truth.shape) for guess in reader(x, truth, fit, seed)
        )  # scikit-learn may drop the axis of a single number
        guess = min(guesses, key=lambda guess: np.square(guess[choose] - truth[choose]).mean())
        errors[name] = np.square(guess[test] - truth[test]).sum(1)
    return errors


def mean_baseline_errors(target: Tensor, parts: ProbeSplit) -> np.ndarray:
    """Squared errors (T,) of the mean of the fitted part: what R^2 measures against."""
    truth = target.double().numpy()
    return np.square(truth[parts.test] - truth[parts.fit].mean(0)).sum(1)


def r2_ci(
    errors: np.ndarray, mean_baseline_errors: np.ndarray, groups: Sequence[str] | None = None, *, resamples: int = 2000
) -> tuple[float, float, float]:
    """(R^2, low, high), 95 % bootstrap over units, or over `groups` of them (T names) where units of a group are
    alike."""
    if groups is not None:
        group = np.unique(np.asarray(groups), return_inverse=True)[1]
        errors, mean_baseline_errors = np.bincount(group, errors), np.bincount(group, mean_baseline_errors)
    draws = np.random.default_rng(0).integers(len(errors), size=(resamples, len(errors)))
    sampled = 1 - errors[draws].mean(1) / mean_baseline_errors[draws].mean(1)
    low, high = np.quantile(sampled, [0.025, 0.975])
    return float(1 - errors.mean() / mean_baseline_errors.mean()), float(low), float(high)
