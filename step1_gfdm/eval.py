"""Program: how good is the forecast (Fig. 9, Q3, Q8)?   python -m step1_gfdm.eval path=ckpts/gfdm/<name> data=<video set>

Truth against prediction at several numbers of denoising steps, beside copying the first frame and the VAE's own limit.
F frames of a clip, of which frame 0 is given and not scored.
"""
from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from common import artifact
from common.metrics import bootstrap_ci, psnr, ssim
from common.mixture import Unreadable
from common.program import program
from step1_gfdm.dataset import VideoClips
from step1_gfdm.model import GFDM

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend must be chosen first: no display)

COPY, LIMIT = "copy the first frame", "VAE there and back"
log = logging.getLogger(__name__)


def measure(model: GFDM, clips: VideoClips, *, count: int, steps: Iterable[int], guidance: float, batch_size: int, seed: int, strips: int,
            draw: Callable[[int, str, dict[str, Tensor]], None]) -> tuple[dict[str, dict[str, list[float]]], list[str]]:
    """Scores of every clip by method and metric, and what could not be read; the first `strips` clips are handed to `draw`."""
    readable, skipped = [], []
    rng = np.random.default_rng(seed)
    for index in np.unique(np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int)):
        try:
            readable.append(clips.sample(int(index), rng))
        except Unreadable as error:
            skipped.append(str(error))
            log.warning("skipped: %s", error)
    if not readable:
        raise ValueError(f"{clips.root}: none of {len(skipped)} clips could be read; the last: {skipped[-1]}")
    device = next(model.unet.parameters()).device
    scores: dict[str, dict[str, list[float]]] = {}
    for start in tqdm(range(0, len(readable), batch_size), desc="forecast", unit="batch"):
        batch = readable[start:start + batch_size]
        truth = torch.stack([item["frames"] for item in batch]).to(device)
        text = [item["text"] for item in batch]
        first = truth[:, 0] * 2 - 1
        coded = torch.stack([model.latent_space.encode(video * 2 - 1) for video in truth])
        videos = {"truth": truth, COPY: truth[:, :1].expand_as(truth), LIMIT: model.latent_space.decode(coded)}
        for number in steps:
            videos[_name(number)] = model.generate(first, text, steps=number, guidance=guidance, seed=seed)
        for name, video in videos.items():
            if name != "truth":
                for metric, function in (("psnr", psnr), ("ssim", ssim)):
                    value = function(video[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1)).view(len(batch), -1).mean(1)
                    scores.setdefault(name, {}).setdefault(metric, []).extend(value.tolist())
        for i in range(max(0, min(len(batch), strips - start))):
            draw(start + i, text[i], {name: video[i] for name, video in videos.items() if name != COPY})
    return scores, skipped


def summarize(scores: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and 95 % interval over clips of every metric, and of its paired difference to copying the first frame."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name, metrics in scores.items():
        for metric, values in metrics.items():
            for key, numbers in ((metric, np.array(values)), (f"{metric}_gain", np.array(values) - np.array(scores[COPY][metric]))):
                mean, low, high = bootstrap_ci(numbers)
                summary.setdefault(name, {})[key] = {"mean": mean, "low": low, "high": high}
    return summary


def table(summary: dict[str, dict[str, dict[str, float]]], clips: int) -> str:
    """The summary as Markdown."""
    lines = [f"Future frames of {clips} clips; mean [95 % interval over clips]. Gain: paired difference to copying the first frame.", "",
             "| forecast | PSNR (dB) | gain | SSIM | gain |", "|---|---|---|---|---|"]
    for name, row in summary.items():
        cells = [f"{row[k]['mean']:.{d}f} [{row[k]['low']:.{d}f}, {row[k]['high']:.{d}f}]"
                 for k, d in (("psnr", 2), ("psnr_gain", 2), ("ssim", 3), ("ssim_gain", 3))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_strip(path: Path, text: str, videos: dict[str, Tensor], *, columns: int = 8) -> None:
    """One PNG: a row a video (F, 3, H, W) in [0, 1], time to the right."""
    length = len(next(iter(videos.values())))
    shown = np.unique(np.linspace(0, length - 1, min(columns, length)).astype(int))
    figure, axes = pyplot.subplots(len(videos), len(shown), figsize=(1.5 * len(shown) + 1, 1.55 * len(videos) + 0.4), squeeze=False)
    for row, (name, video) in zip(axes, videos.items()):
        for axis, frame in zip(row, shown):
            axis.imshow(video[frame].permute(1, 2, 0).float().cpu().numpy())
            axis.set(xticks=[], yticks=[], xlabel=f"frame {frame}" if row is axes[-1] else "")
        row[0].set_ylabel(name, fontsize=8)
    figure.suptitle(text, fontsize=10)
    figure.tight_layout()
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(beside, dpi=100)
        os.replace(beside, path)
    finally:
        pyplot.close(figure)
        beside.unlink(missing_ok=True)


def trained_clip(path: str, name: str) -> dict[str, Any]:
    """The clip rule that a GFDM was trained with, of the set of this name where it had several."""
    rules = artifact.meta(path, "gfdm")["stats"].get("clips")
    if not rules:
        raise ValueError(f"{path} does not say how its training clips were cut; give clip={{stride: N}} or clip={{span: episode}}")
    return rules.get(name) or next(iter(rules.values()))


def _name(steps: int) -> str:
    return f"{steps} step" + "s" * (steps != 1)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text)
    os.replace(beside, path)


@program("step1_eval")
def main(cfg: DictConfig) -> None:
    if not PartialState().is_main_process:  # the launcher starts one process a GPU; a few clips need one
        return
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = artifact.load(cfg.path, "gfdm").to(device)
    if not isinstance(model, GFDM):
        raise ValueError(f"{cfg.path} holds a {type(model).__name__}, which makes no pictures; its error stands in metrics.jsonl (val/mse, val/copy_mse)")
    clip = OmegaConf.to_container(cfg.clip) if cfg.clip else trained_clip(cfg.path, Path(cfg.videos).name)
    clips = VideoClips(cfg.videos, cfg.split, num_frames=model.num_frames, clip=clip, image_size=model.image_size, views={cfg.view: 1.0},
                       annotation=cfg.annotation)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    scores, skipped = measure(model, clips, count=cfg.count, steps=cfg.steps, guidance=cfg.guidance, batch_size=cfg.batch_size, seed=cfg.seed,
                              strips=cfg.strips, draw=lambda i, text, videos: draw_strip(out / "strips" / f"{i:03d}.png", text, videos))
    summary, number = summarize(scores), len(scores[COPY]["psnr"])
    results: dict[str, Any] = {"clips": number, "skipped": skipped, "guidance": cfg.guidance, "seed": cfg.seed, "data": str(cfg.videos),
                               "split": cfg.split, "clip": clip, "gfdm_sha256": artifact.sha256(cfg.path), "summary": summary, "scores": scores}
    _write(out / "results.json", json.dumps(results, indent=2) + "\n")
    _write(out / "table.md", table(summary, number))
    log.info("\n%s", table(summary, number))
    log.info("results in %s", out)


if __name__ == "__main__":
    # `data` is also a config group, whose values Hydra would look up as files
    sys.argv[1:] = [re.sub(r"^data=", "videos=", argument) for argument in sys.argv[1:]]
    main()
