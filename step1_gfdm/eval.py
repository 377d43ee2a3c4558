"""Program: how good is the forecast (Fig. 9, Q3, Q8)?   python -m step1_gfdm.eval path=ckpts/gfdm/<name> data=<video
set>

Truth against prediction by denoising steps, guidance and frame, beside copying the first frame (as it is, and as the
VAE gives it
back) and the VAE's own limit; and what
of the robot's coming motion can be read out of one-step features. F frames of a clip, of which frame 0 is given and not
scored.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from common import artifact
from common.curves import save_curves
from common.distributed import processes
from common.figures import pyplot, save_figure
from common.files import write_text
from common.metrics import bootstrap_ci, psnr, ssim
from common.mixture import UnreadableSample
from common.program import program
from common.video import write_mp4
from step1_gfdm.dataset import VideoClips
from step1_gfdm.model import GFDM
from step1_gfdm.perceptual_metrics import MetricUnavailable, VideoFeatureExtractor, frechet_ci, lpips
from step1_gfdm.probe import fit_probes, gather

COPY, CODED_COPY, LIMIT = "copy the first frame", "copy it through the VAE", "VAE there and back"
BESIDE = {COPY: "--", CODED_COPY: "-.", LIMIT: ":"}  # lines that are no forecast
log = logging.getLogger(__name__)


class Scores:
    """Per clip and future frame, by forecast and metric; and one vector a clip where an eye looks at whole videos."""

    def __init__(
        self, metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]], feature_extractor: VideoFeatureExtractor | None
    ) -> None:
        self.metrics, self.feature_extractor = metrics, feature_extractor
        self.frames: dict[str, dict[str, list[list[float]]]] = {}
        self.seen: dict[str, list[Tensor]] = {}

    def add(self, videos: Mapping[str, Tensor]) -> None:
        """A batch: "truth" and forecasts, each (B, F, 3, H, W) in [0, 1]."""
        truth = videos["truth"]
        for name, video in videos.items():
            if self.feature_extractor:
                self.seen.setdefault(name, []).append(self.feature_extractor(video))
            for metric, function in self.metrics.items() if name != "truth" else ():
                value = function(video[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1)).view(len(truth), -1)
                self.frames.setdefault(name, {}).setdefault(metric, []).extend(value.tolist())

    def clips(self, name: str, metric: str) -> np.ndarray:
        """(N,) means over the future frames."""
        return np.array(self.frames[name][metric]).mean(1)

    def summarize(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and 95 % interval over clips of every metric, and of its paired difference to copying the first
        frame."""
        summary: dict[str, dict[str, dict[str, float]]] = {}
        for name, metrics in self.frames.items():
            row = summary.setdefault(name, {})
            for metric in metrics:
                values = self.clips(name, metric)
                for key, numbers in ((metric, values), (f"{metric}_gain", values - self.clips(COPY, metric))):
                    row[key] = _interval(bootstrap_ci(numbers))
            if self.feature_extractor:
                row["frechet"] = _interval(frechet_ci(torch.cat(self.seen[name]), torch.cat(self.seen["truth"])))
        return summary

    def by_frame(self) -> dict[str, dict[str, list[float]]]:
        """Forecast -> metric -> mean at every future frame."""
        return {
            name: {metric: np.array(values).mean(0).tolist() for metric, values in metrics.items()}
            for name, metrics in self.frames.items()
        }


def _interval(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), values))


def measure(
    model: GFDM,
    clips: VideoClips,
    scores: Scores,
    *,
    count: int,
    steps: Iterable[int],
    guidance_scale: Iterable[float],
    batch_size: int,
    seed: int,
    strips: int,
    draw: Callable[[int, str, dict[str, Tensor]], None],
) -> list[str]:
    """Fill `scores`; returns what could not be read. The first `strips` clips are handed to `draw`."""
    readable, skipped = [], []
    rng = np.random.default_rng(seed)
    for index in np.unique(np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int)):
        try:
            readable.append(clips.sample(int(index), rng))
        except UnreadableSample as error:
            skipped.append(str(error))
            log.warning("skipped: %s", error)
    if not readable:
        raise ValueError(f"{clips.root}: none of {len(skipped)} clips could be read; the last: {skipped[-1]}")
    device = next(model.unet.parameters()).device
    settings = [(number, cfg_scale) for cfg_scale in guidance_scale for number in steps]
    for start in tqdm(range(0, len(readable), batch_size), desc="forecast", unit="batch"):
        batch = readable[start : start + batch_size]
        truth = torch.stack([item["frames"] for item in batch]).to(device)
        text = [item["text"] for item in batch]
        first = truth[:, 0] * 2 - 1
        coded = torch.stack([model.latent_space.encode(video * 2 - 1) for video in truth])
        limit = model.latent_space.decode(coded)
        videos = {
            "truth": truth,
            COPY: truth[:, :1].expand_as(truth),
            CODED_COPY: limit[:, :1].expand_as(truth),
            LIMIT: limit,
        }
        for number, cfg_scale in settings:
            videos[_name(number, cfg_scale)] = model.generate(
                first, text, steps=number, guidance_scale=cfg_scale, seed=seed
            )
        scores.add(videos)
        for i in range(max(0, min(len(batch), strips - start))):
            draw(
                start + i, text[i], {name: video[i] for name, video in videos.items() if name not in (COPY, CODED_COPY)}
            )
    return skipped


def table(summary: dict[str, dict[str, dict[str, float]]], clips: int, notes: Iterable[str] = ()) -> str:
    """The summary as Markdown."""
    names = {
        "psnr": ("PSNR (dB)", 2),
        "psnr_gain": ("gain", 2),
        "ssim": ("SSIM", 3),
        "ssim_gain": ("gain", 3),
        "lpips": ("LPIPS", 3),
        "lpips_gain": ("difference", 3),
        "frechet": ("Fréchet", 2),
    }
    shown = [key for key in names if key in summary[COPY]]
    lines = [
        f"Future frames of {clips} clips; mean [95 % interval over clips]. Gain: paired difference to copying the "
        "first frame.",
        *notes,
        "",
        f"| forecast | {' | '.join(names[key][0] for key in shown)} |",
        "|" + "---|" * (len(shown) + 1),
    ]
    for name, row in summary.items():
        cells = [
            f"{row[k]['mean']:.{names[k][1]}f} [{row[k]['low']:.{names[k][1]}f}, {row[k]['high']:.{names[k][1]}f}]"
            for k in shown
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def probe_table(results: dict[str, dict[str, tuple[float, float, float]]], clips: int) -> str:
    """The read-outs as Markdown."""
    names = {
        "features": "one-step features",
        "present": "present picture",
        "difference": "features' share of the spread above the picture's",
    }
    lines = [
        "",
        f"Read-out of the hand's displacement over the clip: R² on held-out clips of {clips} [95 % interval].",
        "",
        "| read from | linear | MLP |",
        "|---|---|---|",
    ]
    for name, row in results.items():
        cells = [f"{row[kind][0]:.2f} [{row[kind][1]:.2f}, {row[kind][2]:.2f}]" for kind in ("linear", "mlp")]
        lines.append(f"| {names[name]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_horizon(path: Path, by_frame: dict[str, dict[str, list[float]]]) -> None:
    """One PNG: every metric against the frame, a line a forecast."""
    metrics = list(by_frame[COPY])
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(4.5 * len(metrics), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for name, values in by_frame.items():
            style = {"color": "0.4", "linestyle": BESIDE[name]} if name in BESIDE else {}
            axis.plot(range(1, len(values[metric]) + 1), values[metric], marker=".", label=name, **style)
        axis.set(xlabel="frame", ylabel=metric)
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, path)


def film(clips: list[dict[str, Tensor]]) -> np.ndarray:
    """Clips below each other, forecasts side by side, each (F, 3, H, W) in [0, 1] -> (F, rows H, columns W, 3) uint8,
    both sides even."""
    rows = [torch.cat([video.float().cpu() for video in clip.values()], dim=3) for clip in clips]
    frames = (torch.cat(rows, dim=2).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2].numpy()


def draw_strip(path: Path, text: str, videos: dict[str, Tensor], *, columns: int = 8) -> None:
    """One PNG: a row a video (F, 3, H, W) in [0, 1], time to the right."""
    length = len(next(iter(videos.values())))
    shown = np.unique(np.linspace(0, length - 1, min(columns, length)).astype(int))
    figure, axes = pyplot.subplots(
        len(videos), len(shown), figsize=(1.5 * len(shown) + 1, 1.55 * len(videos) + 0.4), squeeze=False
    )
    for row, (name, video) in zip(axes, videos.items()):
        for axis, frame in zip(row, shown):
            axis.imshow(video[frame].permute(1, 2, 0).float().cpu().numpy())
            axis.set(xticks=[], yticks=[], xlabel=f"frame {frame}" if row is axes[-1] else "")
        row[0].set_ylabel(name, fontsize=8)
    figure.suptitle(text, fontsize=10)
    save_figure(figure, path)


def trained_clip(path: str, name: str) -> dict[str, Any]:
    """The clip rule that a GFDM was trained with, of the set of this name where it had several."""
    rules = artifact.read_meta(path, "gfdm")["stats"].get("clips")
    if not rules:
        raise ValueError(
            f"{path} does not say how its training clips were cut; give clip={{stride: N}} or clip={{span: episode}}"
        )
    return rules.get(name) or next(iter(rules.values()))


def _name(steps: int, guidance_scale: float = 1.0) -> str:
    return f"{steps} step" + "s" * (steps != 1) + (f", guidance {guidance_scale:g}" if guidance_scale != 1 else "")


def _eyes(
    cfg: DictConfig, device: str
) -> tuple[dict[str, Callable[[Tensor, Tensor], Tensor]], VideoFeatureExtractor | None, list[str]]:
    """The metrics that this machine can make, and a line on each that it cannot."""
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    feature_extractor, notes = None, []
    try:
        if cfg.lpips:
            metrics["lpips"] = lpips(cfg.lpips)
            notes.append(f"LPIPS by torchmetrics with torchvision's {cfg.lpips}.")
    except MetricUnavailable as error:
        notes.append(f"{error}.")
    try:
        if cfg.feature_extractor:
            feature_extractor = VideoFeatureExtractor(
                cfg.feature_extractor, cfg.feature_extractor_size, torch.device(device)
            )
            notes.append(
                f"Fréchet distance of videos by {feature_extractor.name}; the interval is over resampled clips."
            )
    except MetricUnavailable as error:
        notes.append(f"{error}.")
    return metrics, feature_extractor, notes


@program("step1_eval")
def main(cfg: DictConfig) -> None:
    if not processes().is_main_process:  # the launcher starts one process a GPU; a few clips need one
        return
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = artifact.load(cfg.path, "gfdm").to(device)
    if not isinstance(model, GFDM):
        raise ValueError(
            f"{cfg.path} holds a {type(model).__name__}, which makes no pictures; its error stands in metrics.jsonl "
            "(val/mse, val/copy_mse)"
        )
    clip = OmegaConf.to_container(cfg.clip) if cfg.clip else trained_clip(cfg.path, Path(cfg.videos).name)
    clips = VideoClips(
        cfg.videos,
        cfg.split,
        num_frames=model.num_frames,
        clip=clip,
        image_size=model.image_size,
        views={cfg.view: 1.0},
        annotation=cfg.annotation,
    )
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    metrics, feature_extractor, notes = _eyes(cfg, device)
    scores, filmed = Scores(metrics, feature_extractor), []

    def draw(number: int, text: str, videos: dict[str, Tensor]) -> None:
        draw_strip(out / "strips" / f"{number:03d}.png", text, videos)
        filmed.append(videos)

    skipped = measure(
        model,
        clips,
        scores,
        count=cfg.count,
        steps=cfg.steps,
        guidance_scale=cfg.guidance_scale,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        strips=cfg.strips,
        draw=draw,
    )
    notes += save_curves(Path(cfg.path), {"loss": "loss"}, out / "curves.png")
    summary, by_frame, number = scores.summarize(), scores.by_frame(), len(scores.clips(COPY, "psnr"))
    said = table(summary, number, notes)
    results: dict[str, Any] = {
        "clips": number,
        "skipped": skipped,
        "guidance": list(cfg.guidance_scale),
        "seed": cfg.seed,
        "data": str(cfg.videos),
        "split": cfg.split,
        "clip": clip,
        "gfdm_sha256": artifact.sha256(cfg.path),
        "notes": notes,
        "summary": summary,
        "by_frame": by_frame,
        "scores": scores.frames,
    }
    read = gather(model, clips, count=cfg.probe, batch_size=cfg.batch_size, seed=cfg.seed) if cfg.probe else None
    if read is not None:
        results["probe"] = fit_probes(read, seed=cfg.seed)
        said += probe_table(results["probe"], len(read.displacement))
    elif cfg.probe:
        log.warning("no probe: the annotations of %s hold no readings of the robot ('state')", cfg.videos)
    draw_horizon(out / "horizon.png", by_frame)
    if filmed:
        write_mp4(out / "films.mp4", film(filmed), cfg.fps)
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "table.md", said)
    log.info("\n%s", said)
    log.info("results in %s", out)


if __name__ == "__main__":
    # `data` is also a config group, whose values Hydra would look up as files
    sys.argv[1:] = [re.sub(r"^data=", "videos=", argument) for argument in sys.argv[1:]]
    main()
