"""Pictures and films of what the latent actions see and mean (Fig. 12). Frames are (3, S, S) in [0, 1]; K queries, N
visual tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.figures import pyplot, save_figure
from common.video import write_mp4
from step2_gidm.analysis import EncodedPairs, Labels, Transfer, decode_transferred, nearest_frame
from step2_gidm.model import GIDM, InverseModel

SAME, OTHER = "tab:green", "tab:red"


def attention_maps(model: GIDM, pairs: Sequence[Mapping[str, Any]], batch_size: int) -> Tensor:
    """Where each query looks in the future frames: (P, K, rows, columns), a map sums to one."""
    device, maps = next(model.parameters()).device, []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        now, future = (
            model.embed(torch.stack([pair["frames"][moment] for pair in batch]).to(device)) for moment in (0, 1)
        )
        maps.append(model.attention(now, future, [pair["text"] for pair in batch]).float().cpu())
    return torch.cat(maps).unflatten(-1, model.vision.grid)


class Overlay:
    """A row of pictures: both frames, then the future frame under the attention of all queries and of each."""

    def __init__(self, maps: Tensor, size: int, title: str) -> None:
        self.maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1)
        columns = 2 + self.maps.shape[1]
        self.figure, axes = pyplot.subplots(1, columns, figsize=(1.8 * columns, 2.4), squeeze=False)
        blank, side = np.zeros((size, size, 3)), (-0.5, size - 0.5, size - 0.5, -0.5)
        self.pictures = [axis.imshow(blank, vmin=0, vmax=1) for axis in axes[0]]
        # one scale a column: over a film it shows when a query looks hard and when it looks everywhere
        style = {"cmap": "jet", "alpha": 0.45, "extent": side, "interpolation": "bicubic", "vmin": 0}
        self.heats = [
            axis.imshow(self.maps[0, k], vmax=float(self.maps[:, k].max()), **style)
            for k, axis in enumerate(axes[0][2:])
        ]
        names = ["now", "future", "all queries", *(f"query {k}" for k in range(maps.shape[1]))]
        for axis, name in zip(axes[0], names):
            axis.set(xticks=[], yticks=[], xlim=side[:2], ylim=side[2:])
            axis.set_title(name, fontsize=9)
        self.figure.suptitle(title, fontsize=10)
        self.figure.tight_layout()

    def show(self, number: int, frames: Tensor) -> None:
        """Pair `number`, with its frames (2, 3, S, S)."""
        now, future = (frame.permute(1, 2, 0).numpy() for frame in frames)
        for picture, image in zip(self.pictures, [now] + [future] * (len(self.pictures) - 1)):
            picture.set_data(image)
        for heat, values in zip(self.heats, self.maps[number]):
            heat.set_data(values)

    def array(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        self.figure.canvas.draw()
        return np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy()


def draw_attention(model: GIDM, pair: Mapping[str, Any], path: Path) -> None:
    """One PNG of a pair under each query's attention (Fig. 12)."""
    overlay = Overlay(attention_maps(model, [pair], 1), pair["frames"].shape[-1], pair["text"])
    overlay.show(0, pair["frames"])
    save_figure(overlay.figure, path)


def film_attention(model: GIDM, clip: Mapping[str, Any], path: Path, *, fps: float, batch_size: int) -> None:
    """A film of one clip, pair by pair, as `draw_attention` shows one. clip: what Transitions.walk returns."""
    pairs = [{"frames": frames, "text": clip["text"]} for frames in clip["frames"]]
    overlay = Overlay(attention_maps(model, pairs, batch_size), clip["frames"].shape[-1], clip["text"])
    shown = []
    for number, pair in enumerate(tqdm(pairs, desc=path.stem, leave=False)):
        overlay.show(number, pair["frames"])
        shown.append(overlay.array())
    pyplot.close(overlay.figure)
    write_mp4(path, np.stack(shown), fps)


def draw_neighbours(path: Path, pairs: Sequence[Mapping[str, Any]], found: np.ndarray, queries: Sequence[int]) -> None:
    """One PNG: a row a query with the pairs found for it (P, neighbours), each as its two frames; green: the same
    sentence."""
    figure, axes = pyplot.subplots(
        len(queries), 1 + found.shape[1], figsize=(3.2 * (1 + found.shape[1]), 2.1 * len(queries)), squeeze=False
    )
    for row, query in zip(axes, queries):
        for axis, number in zip(row, [query, *found[query]]):
            axis.axis("off")
            if number >= 0:
                axis.imshow(_twin(pairs[number]["frames"]))
                same = pairs[number]["text"] == pairs[query]["text"]
                axis.set_title(
                    _short(pairs[number]["text"]),
                    fontsize=8,
                    color="black" if number == query else SAME if same else OTHER,
                )
    for axis, name in zip(axes[0], ["query: now | future", *(f"neighbour {i + 1}" for i in range(found.shape[1]))]):
        axis.set_title(f"{name}\n{axis.get_title()}", fontsize=8, color=axis.title.get_color())
    save_figure(figure, path)


def draw_transfer(
    path: Path,
    model: InverseModel,
    pairs: Sequence[Mapping[str, Any]],
    encoded: EncodedPairs,
    known: Labels,
    partners: Transfer,
    rows: Sequence[int],
) -> None:
    """One PNG: the action of one scene, the frame of another, and the real frame there that the decoded tokens are
    nearest to."""
    names = [
        "action: now",
        "action: future",
        "another scene",
        "action decoded there\n(nearest real frame)",
        "what happened there",
    ]
    figure, axes = pyplot.subplots(
        len(rows), len(names), figsize=(2 * len(names), 2.1 * len(rows) + 0.3), squeeze=False
    )
    for axis, name in zip(axes[0], names):
        axis.set_title(name, fontsize=9)
    target, source = partners.target[rows], partners.source[rows]
    for line, t, s, tokens in zip(axes, target, source, decode_transferred(model, encoded, known, target, source)):
        pair, moment = nearest_frame(encoded, known, tokens, int(t))
        images = [*pairs[s]["frames"], pairs[t]["frames"][0], pairs[pair]["frames"][moment], pairs[t]["frames"][1]]
        for axis, image in zip(line, images):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(_short(pairs[t]["text"], 24), fontsize=8)
    save_figure(figure, path)


def _twin(frames: Tensor) -> np.ndarray:
    """(2, 3, S, S) -> (S, 2 S + gap, 3), white between."""
    gap = torch.ones(3, frames.shape[2], max(1, frames.shape[3] // 32))
    return torch.cat([frames[0], gap, frames[1]], dim=2).permute(1, 2, 0).numpy()


def _short(text: str, width: int = 40) -> str:
    return "\n".join(textwrap.wrap(text, width)[:2])
