"""Films of rollouts: the static camera with the instruction beneath, kept for the first successes and failures."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

BAR = 28  # pixels under the picture for two lines of text
LETTERS = 32  # that fit the width of CALVIN's 200 pixels
HOLD = 6  # frames that a success stays on screen
GREEN, WHITE = (90, 220, 110), (235, 235, 235)
NAME = re.compile(r"(\d+)_(\d+)of(\d+)\.mp4")


class Film:
    """Collects captioned frames (H + 28, W, 3) uint8."""

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []
        self.caption = ""

    def start_task(self, caption: str) -> None:
        """Start a sub-task."""
        self.caption = caption

    def add(self, picture: np.ndarray, *, done: bool = False) -> None:
        """Add an (H, W, 3) uint8 picture; a solved sub-task turns the caption green for a moment."""
        height, width = picture.shape[:2]
        page = Image.new("RGB", (width, height + BAR))
        page.paste(Image.fromarray(picture), (0, 0))
        lines = textwrap.wrap(self.caption, max(8, LETTERS * width // 200))[:2]
        ImageDraw.Draw(page).multiline_text((3, height + 1), "\n".join(lines), fill=GREEN if done else WHITE, spacing=1)
        self.frames.extend([np.asarray(page)] * (HOLD if done else 1))


def name(index: int, done: int, length: int) -> str:
    """File name of the film of a chain."""
    return f"{index:04d}_{done}of{length}.mp4"


def find(folder: Path) -> dict[str, list[Path]]:
    """Films of a folder in the order of their sequences: {"success": [...], "failure": [...]}."""
    films: dict[str, list[Path]] = {"success": [], "failure": []}
    for path in sorted(folder.glob("*.mp4")):
        if match := NAME.fullmatch(path.name):
            films["success" if match[2] == match[3] else "failure"].append(path)
    return films


def prune(folder: Path, keep: int) -> None:
    """Leave the first `keep` successes and the first `keep` failures."""
    for paths in find(folder).values():
        for path in paths[keep:]:
            path.unlink()
