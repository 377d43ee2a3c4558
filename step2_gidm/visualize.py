"""Figures and films of the attention of the queries and of what the latent actions carry (Fig. 12).

Frames are (3, S, S) in [0, 1]; K queries, N visual tokens, P pairs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from common.figures import pyplot, save_figure
from common.progress import tqdm
from common.video import write_mp4
from step2_gidm.analysis import EncodedPairs, Labels, TransferPairs, decode_transferred, nearest_frame
from step2_gidm.model import GIDM, InverseModel

SAME, OTHER = "tab:green", "tab:red"


def attention_maps(model: GIDM, pairs: Sequence[Mapping[str, Any]], batch_size: int) -> Tensor:
    """The attention of each query to the future frames: (P, K, rows, columns), of which each map sums to one."""
    device, maps = next(model.parameters()).device, []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        # the frames of one moment at a time: the vision encoder sees batch_size images
        now, future = (
            model.embed(torch.stack([pair["frames"][moment] for pair in batch]).to(device)) for moment in (0, 1)
        )
        maps.append(model.attention(now, future, [pair["text"] for pair in batch]).float().cpu())
    rows, columns = model.vision.grid
    return rearrange(torch.cat(maps), "p k (r c) -> p k r c", r=rows, c=columns)


class AttentionFigure:
    """A row of images: both frames of a pair, then the future frame under the attention of all queries and of each.

    maps: (P, K, rows, columns). size: side S of the frames. `show` selects the pair.
    """

    def __init__(self, maps: Tensor, size: int, title: str) -> None:
        self.maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1)  # (P, 1 + K, rows, columns)
        columns = 2 + self.maps.shape[1]
        self.figure, axes = pyplot.subplots(1, columns, figsize=(1.8 * columns, 2.4), squeeze=False)
        blank, side = np.zeros((size, size, 3)), (-0.5, size - 0.5, size - 0.5, -0.5)
        self.images = [axis.imshow(blank, vmin=0, vmax=1) for axis in axes[0]]
        # One colour scale for all pairs of a query, so that a film shows when its attention is sharp.
        style = {"cmap": "jet", "alpha": 0.45, "extent": side, "interpolation": "bicubic", "vmin": 0}
        self.heatmaps = [
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
        """Show pair `number`, of which the frames are (2, 3, S, S)."""
        now, future = rearrange(frames, "t c h w -> t h w c").numpy()
        for image, pixels in zip(self.images, [now] + [future] * (len(self.images) - 1)):
            image.set_data(pixels)
        for heatmap, values in zip(self.heatmaps, self.maps[number]):
            heatmap.set_data(values)

    def array(self) -> np.ndarray:
        """The figure as an image, (H, W, 3) uint8."""
        self.figure.canvas.draw()
        return np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy()


def draw_attention(model: GIDM, pair: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of one pair under the attention of each query (Fig. 12)."""
    figure = AttentionFigure(attention_maps(model, [pair], 1), pair["frames"].shape[-1], pair["text"])
    figure.show(0, pair["frames"])
    save_figure(figure.figure, path)


def film_attention(model: GIDM, clip: Mapping[str, Any], path: Path, *, fps: float, batch_size: int) -> None:
    """Write a film of one episode in which `draw_attention` follows its pairs. clip: from Transitions.episode_pairs."""
    pairs = [{"frames": frames, "text": clip["text"]} for frames in clip["frames"]]
    figure = AttentionFigure(attention_maps(model, pairs, batch_size), clip["frames"].shape[-1], clip["text"])
    frames = []
    for number, pair in enumerate(tqdm(pairs, desc=path.stem, leave=False)):
        figure.show(number, pair["frames"])
        frames.append(figure.array())
    pyplot.close(figure.figure)
    write_mp4(path, np.stack(frames), fps)


def draw_neighbours(
    path: Path, pairs: Sequence[Mapping[str, Any]], neighbours: np.ndarray, queries: Sequence[int]
) -> None:
    """Write a PNG with a row for each of `queries`: the pair, then its neighbours, each as its two frames.

    neighbours: (P, count) from analysis.find_neighbours. A green title marks the same sentence, a red one another.
    """
    rows, columns = len(queries), 1 + neighbours.shape[1]
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 2.1 * rows), squeeze=False)
    for row, query in zip(axes, queries):
        for axis, number in zip(row, [query, *neighbours[query]]):
            axis.axis("off")
            if number >= 0:
                axis.imshow(_side_by_side(pairs[number]["frames"]))
                same = pairs[number]["text"] == pairs[query]["text"]
                color = "black" if number == query else SAME if same else OTHER
                axis.set_title(_wrap(pairs[number]["text"]), fontsize=8, color=color)
    names = ["query: now | future", *(f"neighbour {i + 1}" for i in range(neighbours.shape[1]))]
    for axis, name in zip(axes[0], names):
        axis.set_title(f"{name}\n{axis.get_title()}", fontsize=8, color=axis.title.get_color())
    save_figure(figure, path)


def draw_transfer(
    path: Path,
    model: InverseModel,
    pairs: Sequence[Mapping[str, Any]],
    encoded: EncodedPairs,
    labels: Labels,
    transfer: TransferPairs,
    rows: Sequence[int],
) -> None:
    """Write a PNG with a row for each of `rows` of `transfer`: the latent action of one scene applied in another.

    The decoded tokens are shown by the real frame of that scene whose tokens are nearest.
    """
    names = [
        "action: now",
        "action: future",
        "another scene",
        "action decoded there\n(nearest real frame)",
        "what happened there",
    ]
    size = (2 * len(names), 2.1 * len(rows) + 0.3)
    figure, axes = pyplot.subplots(len(rows), len(names), figsize=size, squeeze=False)
    for axis, name in zip(axes[0], names):
        axis.set_title(name, fontsize=9)
    targets, sources = transfer.target[rows], transfer.source[rows]
    decoded = decode_transferred(model, encoded, labels, targets, sources)
    for row, target, source, tokens in zip(axes, targets, sources, decoded):
        pair, moment = nearest_frame(encoded, labels, tokens, int(target))
        now, future = pairs[target]["frames"]
        for axis, image in zip(row, [*pairs[source]["frames"], now, pairs[pair]["frames"][moment], future]):
            axis.imshow(rearrange(image, "c h w -> h w c").numpy())
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(_wrap(pairs[target]["text"], 24), fontsize=8)
    save_figure(figure, path)


def _side_by_side(frames: Tensor) -> np.ndarray:
    """(2, 3, S, S) -> (S, 2 S + gap, 3) with a white gap between the frames."""
    gap = torch.ones(3, frames.shape[2], max(1, frames.shape[3] // 32))
    return rearrange(torch.cat([frames[0], gap, frames[1]], dim=2), "c h w -> h w c").numpy()


def _wrap(text: str, width: int = 40) -> str:
    return "\n".join(textwrap.wrap(text, width)[:2])
