"""Figures that need no display and are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from common.files import atomic_path

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend must be chosen before the import)

__all__ = ["pyplot", "save_figure"]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix and close it."""
    figure.tight_layout()
    try:
        with atomic_path(path) as part:
            figure.savefig(part, dpi=100)
    finally:
        pyplot.close(figure)
