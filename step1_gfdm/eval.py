"""Measure a forward model (Fig. 9, Q3, Q8): predicted against true frames, by denoising steps and guidance.

Three references are reported with the forecasts: copying the first frame, copying the VAE's reconstruction of it, and
the VAE's reconstruction of the true frames, which limits every forecast. With `probe`, the program also measures how
much of the robot's coming motion can be predicted from the features of one denoising step. The folder `out` then holds
results.json, table.md, horizon.png (metrics by frame), strips/ and films.mp4.

Examples:
    python -m step1_gfdm.eval path=ckpts/gfdm/tiny videos=data/playtable/A/videos_set count=16 lpips=null
    scripts/step1_eval_svd.sh path=ckpts/gfdm/full videos=data/opensource_robotdata/bridge steps=[1,20] probe=200
"""

# B batch, F frames of a clip, N clips. Frame 0 is given to the model and is not scored.

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from common import artifact
from common.curves import save_curves
from common.distributed import processes
from common.errors import UnreadableSample, UserError
from common.figures import pyplot, save_figure
from common.files import write_json, write_text
from common.image_range import normalize
from common.metrics import bootstrap_ci, psnr, ssim
from common.program import program
from common.progress import tqdm
from common.video import write_mp4
from step1_gfdm.dataset import VideoClips
from step1_gfdm.model import GFDM
from step1_gfdm.perceptual_metrics import MetricUnavailable, VideoFeatureExtractor, frechet_ci, lpips
from step1_gfdm.probe import fit_probes, gather

COPY, COPY_VAE, VAE_LIMIT = "copy the first frame", "copy its VAE reconstruction", "VAE reconstruction"
REFERENCE_STYLES = {COPY: "--", COPY_VAE: "-.", VAE_LIMIT: ":"}  # lines of horizon.png that are not forecasts
Metric = Callable[[Tensor, Tensor], Tensor]  # two of (N, 3, H, W) in [0, 1] -> (N,)
log = logging.getLogger(__name__)


class Scores:
    """Every metric of every clip, future frame and forecast, and one vector per clip for the Fréchet distance."""

    def __init__(self, metrics: Mapping[str, Metric], feature_extractor: VideoFeatureExtractor | None) -> None:
        self.metrics, self.feature_extractor = metrics, feature_extractor
        self.frames: dict[str, dict[str, list[list[float]]]] = {}  # forecast -> metric -> [clip][future frame]
        self.video_features: dict[str, list[Tensor]] = {}  # forecast -> batches (B, D)

    def add(self, videos: Mapping[str, Tensor]) -> None:
        """Add a batch: "truth" and the forecasts by name, each (B, F, 3, H, W) in [0, 1]."""
        truth = rearrange(videos["truth"][:, 1:], "b f c h w -> (b f) c h w")
        for name, video in videos.items():
            if self.feature_extractor:
                self.video_features.setdefault(name, []).append(self.feature_extractor(video))
            if name == "truth":
                continue
            prediction = rearrange(video[:, 1:], "b f c h w -> (b f) c h w")
            for key, metric in self.metrics.items():
                values = rearrange(metric(prediction, truth), "(b f) -> b f", b=len(video))
                self.frames.setdefault(name, {}).setdefault(key, []).extend(values.tolist())

    def by_clip(self, name: str, metric: str) -> np.ndarray:
        """A forecast's metric as (N,) means over the future frames."""
        return np.array(self.frames[name][metric]).mean(1)

    def by_frame(self) -> dict[str, dict[str, list[float]]]:
        """Forecast -> metric -> mean over clips at every future frame."""
        return {
            name: {metric: np.array(values).mean(0).tolist() for metric, values in metrics.items()}
            for name, metrics in self.frames.items()
        }

    def summarize(self) -> dict[str, dict[str, dict[str, float]]]:
        """Forecast -> metric -> {mean, low, high}, with 95 % bootstrap intervals over clips.

        "<metric>_gain" is the paired difference from copying the first frame.
        """
        summary: dict[str, dict[str, dict[str, float]]] = {}
        for name, metrics in self.frames.items():
            row = summary.setdefault(name, {})
            for metric in metrics:
                values = self.by_clip(name, metric)
                row[metric] = _interval(bootstrap_ci(values))
                row[f"{metric}_gain"] = _interval(bootstrap_ci(values - self.by_clip(COPY, metric)))
            if self.feature_extractor:
                prediction, truth = torch.cat(self.video_features[name]), torch.cat(self.video_features["truth"])
                row["frechet"] = _interval(frechet_ci(prediction, truth))
        return summary


def _interval(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), values))


def read_clips(clips: VideoClips, count: int, *, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """`count` clips spread evenly over the set, and the messages of those that cannot be read.

    Raises UserError where none can be read.
    """
    items, unreadable = [], []
    rng = np.random.default_rng(seed)
    for index in np.unique(np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int)):
        try:
            items.append(clips.sample(int(index), rng))
        except UnreadableSample as error:
            unreadable.append(str(error))
            log.warning("skipped: %s", error)
    if not items:
        reason = f"the last message: {unreadable[-1]}" if unreadable else "the split is empty or count is 0"
        raise UserError(f"{clips.root}: no clip can be read; {reason}")
    return items, unreadable


def score_forecasts(
    model: GFDM,
    items: list[dict[str, Any]],
    scores: Scores,
    *,
    steps: Iterable[int],
    guidance_scales: Iterable[float],
    batch_size: int,
    seed: int,
    draw: Callable[[int, str, dict[str, Tensor]], None],
) -> None:
    """Add the forecasts of all `items` (of VideoClips) to `scores`, for every number of steps with every guidance.

    draw: called for every clip with its number, its sentence and its videos (F, 3, H, W) in [0, 1] by name.
    """
    device = next(model.unet.parameters()).device
    settings = [(num_steps, scale) for scale in guidance_scales for num_steps in steps]
    for start in tqdm(range(0, len(items), batch_size), desc="forecast", unit="batch"):
        batch = items[start : start + batch_size]
        truth = torch.stack([item["frames"] for item in batch]).to(device)  # (B, F, 3, H, W) in [0, 1]
        text = [item["text"] for item in batch]
        latents = torch.stack([model.vae.encode(normalize(video)) for video in truth])  # (B, F, c, h, w)
        reconstruction = model.vae.decode(latents)  # (B, F, 3, H, W) in [0, 1]
        videos = {
            "truth": truth,
            COPY: truth[:, :1].expand_as(truth),
            COPY_VAE: reconstruction[:, :1].expand_as(truth),
            VAE_LIMIT: reconstruction,
        }
        first = normalize(truth[:, 0])
        for num_steps, scale in settings:
            videos[_forecast_name(num_steps, scale)] = model.generate(
                first, text, steps=num_steps, guidance_scale=scale, seed=seed
            )
        scores.add(videos)
        for i in range(len(batch)):
            draw(start + i, text[i], {name: video[i] for name, video in videos.items()})


def _forecast_name(steps: int, guidance_scale: float = 1.0) -> str:
    return f"{steps} step" + "s" * (steps != 1) + (f", guidance {guidance_scale:g}" if guidance_scale != 1 else "")


def metric_table(summary: dict[str, dict[str, dict[str, float]]], clips: int, notes: Iterable[str] = ()) -> str:
    """The summary of Scores as Markdown, with a line for each note."""
    columns = {  # metric -> (heading, decimals)
        "psnr": ("PSNR (dB)", 2),
        "psnr_gain": ("gain", 2),
        "ssim": ("SSIM", 3),
        "ssim_gain": ("gain", 3),
        "lpips": ("LPIPS", 3),
        "lpips_gain": ("difference", 3),
        "frechet": ("Fréchet", 2),
    }
    shown = [key for key in columns if key in summary[COPY]]
    lines = [
        f"Future frames of {clips} clips; mean [95 % interval over clips]. Gain: paired difference from copying the "
        "first frame.",
        *notes,
        "",
        f"| forecast | {' | '.join(columns[key][0] for key in shown)} |",
        "|" + "---|" * (len(shown) + 1),
    ]
    for name, row in summary.items():
        cells = [_cell(row[key]["mean"], row[key]["low"], row[key]["high"], columns[key][1]) for key in shown]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def probe_table(results: dict[str, dict[str, tuple[float, float, float]]], clips: int) -> str:
    """The results of fit_probes as Markdown."""
    names = {
        "features": "features of one denoising step",
        "present": "present image",
        "difference": "share of the variance that only the features explain",
    }
    lines = [
        "",
        f"Probes of the hand's displacement over the clip: R² on the test clips of {clips} [95 % interval].",
        "",
        "| input | linear | MLP |",
        "|---|---|---|",
    ]
    for name, row in results.items():
        lines.append(f"| {names[name]} | {' | '.join(_cell(*row[kind], 2) for kind in ('linear', 'mlp'))} |")
    return "\n".join(lines) + "\n"


def _cell(value: float, low: float, high: float, decimals: int) -> str:
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def draw_horizon(path: Path, by_frame: dict[str, dict[str, list[float]]]) -> None:
    """Write one PNG with a plot for each metric, over the frames, with a line for each forecast."""
    metrics = list(by_frame[COPY])
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(4.5 * len(metrics), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for name, values in by_frame.items():
            style = {"color": "0.4", "linestyle": REFERENCE_STYLES[name]} if name in REFERENCE_STYLES else {}
            axis.plot(range(1, len(values[metric]) + 1), values[metric], marker=".", label=name, **style)
        axis.set(xlabel="frame", ylabel=metric)
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, path)


def video_grid(clips: list[dict[str, Tensor]]) -> np.ndarray:
    """One video with a row for each clip and a column for each of its videos (F, 3, H, W) in [0, 1].

    Returns (F, rows * H, columns * W, 3) uint8; both sides are cut to even numbers, as H.264 needs.
    """
    rows = [torch.cat([video.float().cpu() for video in clip.values()], dim=3) for clip in clips]
    grid = (torch.cat(rows, dim=2).clamp(0, 1) * 255).round().byte()  # (F, 3, rows * H, columns * W)
    frames = rearrange(grid, "f c h w -> f h w c")
    return frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2].numpy()


def draw_strip(path: Path, text: str, videos: dict[str, Tensor], *, columns: int = 8) -> None:
    """Write one PNG with a row for each video (F, 3, H, W) in [0, 1] and up to `columns` of its frames side by side."""
    length = len(next(iter(videos.values())))
    shown = np.unique(np.linspace(0, length - 1, min(columns, length)).astype(int))
    figure, axes = pyplot.subplots(
        len(videos), len(shown), figsize=(1.5 * len(shown) + 1, 1.55 * len(videos) + 0.4), squeeze=False
    )
    for row, (name, video) in zip(axes, videos.items()):
        for axis, frame in zip(row, shown):
            axis.imshow(rearrange(video[frame], "c h w -> h w c").float().cpu().numpy())
            axis.set(xticks=[], yticks=[], xlabel=f"frame {frame}" if row is axes[-1] else "")
        row[0].set_ylabel(name, fontsize=8)
    figure.suptitle(text, fontsize=10)
    save_figure(figure, path)


def trained_clip_rule(path: str, name: str) -> dict[str, Any]:
    """The clip rule that a GFDM was trained with: that of the set `name`, else that of its first set.

    Raises UserError where its meta.json holds none.
    """
    rules = artifact.read_meta(path, "gfdm")["stats"].get("clips")
    if not rules:
        raise UserError(
            f"{path} does not say how its training clips were cut; give clip={{stride: N}} or clip={{span: episode}}"
        )
    return rules.get(name) or next(iter(rules.values()))


def build_metrics(cfg: DictConfig, device: str) -> tuple[dict[str, Metric], VideoFeatureExtractor | None, list[str]]:
    """The metrics and the feature extractor that this machine has, and a line for the table on each network."""
    metrics: dict[str, Metric] = {"psnr": psnr, "ssim": ssim}
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
    """Measure, and write the folder `out`."""
    if not processes().is_main_process:  # the launcher starts one process per GPU, but a few clips need only one
        return
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = artifact.load(cfg.path, "gfdm").to(device)
    if not isinstance(model, GFDM):
        raise UserError(
            f"{cfg.path} holds a {type(model).__name__}, which makes no images; its error is in metrics.jsonl "
            "(val/mse, and val/copy_mse for copying the present)"
        )
    clip_rule = OmegaConf.to_container(cfg.clip) if cfg.clip else trained_clip_rule(cfg.path, Path(cfg.videos).name)
    clips = VideoClips(
        cfg.videos,
        cfg.split,
        num_frames=model.num_frames,
        clip=clip_rule,
        image_size=model.image_size,
        views={cfg.view: 1.0},
        annotation=cfg.annotation,
    )
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    metrics, feature_extractor, notes = build_metrics(cfg, device)
    scores, drawn = Scores(metrics, feature_extractor), []

    def draw(number: int, text: str, videos: dict[str, Tensor]) -> None:
        if number < cfg.strips:
            videos = {name: video for name, video in videos.items() if name not in (COPY, COPY_VAE)}
            draw_strip(out / "strips" / f"{number:03d}.png", text, videos)
            drawn.append(videos)

    items, unreadable = read_clips(clips, cfg.count, seed=cfg.seed)
    score_forecasts(
        model,
        items,
        scores,
        steps=cfg.steps,
        guidance_scales=cfg.guidance_scale,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        draw=draw,
    )
    notes += save_curves(Path(cfg.path), {"loss": "loss"}, out / "curves.png")
    summary, by_frame = scores.summarize(), scores.by_frame()
    table = metric_table(summary, len(items), notes)
    results: dict[str, Any] = {
        "clips": len(items),
        "skipped": unreadable,
        "guidance_scale": list(cfg.guidance_scale),
        "seed": cfg.seed,
        "videos": str(cfg.videos),
        "split": cfg.split,
        "clip": clip_rule,
        "gfdm_sha256": artifact.sha256(cfg.path),
        "notes": notes,
        "summary": summary,
        "by_frame": by_frame,
        "scores": scores.frames,
    }
    if cfg.probe:
        data = gather(model, clips, count=cfg.probe, batch_size=cfg.batch_size, seed=cfg.seed)
        if data is None:
            log.warning("no probe: the annotations of %s hold no readings of the robot ('state')", cfg.videos)
        else:
            results["probe"] = fit_probes(data, seed=cfg.seed)
            table += probe_table(results["probe"], len(data.displacement))
    draw_horizon(out / "horizon.png", by_frame)
    if drawn:
        write_mp4(out / "films.mp4", video_grid(drawn), cfg.fps)
    write_json(out / "results.json", results)
    write_text(out / "table.md", table)
    log.info("\n%s", table)
    log.info("results in %s", out)


if __name__ == "__main__":
    main()
