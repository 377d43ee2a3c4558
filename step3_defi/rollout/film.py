"""Films of rollouts: the static camera with the instruction below it, kept for the first successes and failures."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CAPTION_HEIGHT = 28  # pixels below the picture, for two lines of text
LETTERS_PER_LINE = 32  # that fit the width of CALVIN's 200 pixels
SUCCESS_FRAMES = 6  # frames that a success stays on screen
GREEN, WHITE = (90, 220, 110), (235, 235, 235)
FILE_PATTERN = re.compile(r"(\d+)_(\d+)of(\d+)\.mp4")


class Film:
    """Collects captioned frames, each (H + CAPTION_HEIGHT, W, 3) uint8."""

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []
        self.caption = ""

    def start_task(self, caption: str) -> None:
        """Set the caption of the frames that follow."""
        self.caption = caption

    def add(self, picture: np.ndarray, *, done: bool = False) -> None:
        """Add an (H, W, 3) uint8 picture. With `done` it stays for a moment and its caption is green."""
        height, width = picture.shape[:2]
        frame = Image.new("RGB", (width, height + CAPTION_HEIGHT))
        frame.paste(Image.fromarray(picture), (0, 0))
        lines = textwrap.wrap(self.caption, max(8, LETTERS_PER_LINE * width // 200))[:2]
        colour = GREEN if done else WHITE
        ImageDraw.Draw(frame).multiline_text((3, height + 1), "\n".join(lines), fill=colour, spacing=1)
        self.frames.extend([np.asarray(frame)] * (SUCCESS_FRAMES if done else 1))


def file_name(index: int, solved: int, length: int) -> str:
    """The name of the film of a sequence of `length` sub-tasks, `solved` of which succeeded."""
    return f"{index:04d}_{solved}of{length}.mp4"


def find(folder: Path) -> dict[str, list[Path]]:
    """The films of a folder in the order of their sequences: {"success": [...], "failure": [...]}."""
    films: dict[str, list[Path]] = {"success": [], "failure": []}
    for path in sorted(folder.glob("*.mp4")):
        if match := FILE_PATTERN.fullmatch(path.name):
            films["success" if match[2] == match[3] else "failure"].append(path)
    return films


def prune(folder: Path, keep: int) -> None:
    """Delete all films but the first `keep` successes and the first `keep` failures."""
    for paths in find(folder).values():
        for path in paths[keep:]:
            path.unlink()
