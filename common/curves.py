"""The curves of a training run, read from its metrics.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.errors import MissingFileError, UserError
from common.figures import pyplot, save_figure

LOGARITHMIC = {"loss", "mse", "copy_mse"}
Series = dict[str, tuple[list[float], list[float]]]  # "train/mse" -> (steps, values)


def read_metrics(path: Path) -> Series:
    """metrics.jsonl -> {key: (steps, values)}. An incomplete last line is left out. Raises UserError."""
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; a training writes it")
    series: Series = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no row of metrics ({error})") from error
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, (int, float)):
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return series


def draw_curves(run: Path, panels: Mapping[str, str]) -> Figure:
    """Plot the metrics of the run in folder `run`, one panel per entry of `panels`, a title and a regular expression.

    A panel shows every key whose last part matches its expression, training and validation together. Panels without a
    key are left out. Raises UserError where none is left or nothing was logged.
    """
    series = read_metrics(run / "metrics.jsonl")
    known = {
        title: [key for key in series if re.fullmatch(pattern, key.split("/")[-1])] for title, pattern in panels.items()
    }
    known = {title: keys for title, keys in known.items() if keys}
    if not known:
        raise UserError(
            f"{run / 'metrics.jsonl'} has none of {', '.join(panels)}; it has {', '.join(series) or 'nothing'}"
        )
    figure, axes = pyplot.subplots(1, len(known), figsize=(4.2 * len(known), 3), squeeze=False)
    for axis, (title, keys) in zip(axes[0], known.items()):
        names = sorted({key.split("/")[-1] for key in keys})
        for key in keys:
            (steps, values), colour = series[key], f"C{names.index(key.split('/')[-1]) % 10}"
            noisy = len(steps) > 30
            line = {"color": colour, "linestyle": "--" if key.startswith("val/") else "-"}
            axis.plot(
                steps,
                values,
                alpha=0.35 if noisy else 1,
                marker=None if noisy else "o",
                markersize=3,
                label=None if noisy else key,
                **line,
            )
            if noisy:
                axis.plot(steps, smooth(values), label=f"{key} (mean)", **line)
        if all(key.split("/")[-1] in LOGARITHMIC and min(series[key][1]) > 0 for key in keys):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7 if len(keys) < 6 else 5, ncols=1 if len(keys) < 6 else 2, framealpha=0.5)
    figure.tight_layout()
    return figure


def save_curves(run: Path, panels: Mapping[str, str], path: Path) -> list[str]:
    """Save `draw_curves` as a file and return []; where that is impossible, return a line that says why."""
    try:
        save_figure(draw_curves(run, panels), path)
    except UserError as error:
        return [f"No curves of the training: {error}."]
    return []


def smooth(values: list[float], share: float = 0.05) -> np.ndarray:
    """Running mean over a window of `share` of the run, which is shorter at the start."""
    width = max(2, int(len(values) * share))
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (total[ends] - total[starts]) / (ends - starts)
