"""What eval reports: scores by clip and frame, metrics whose networks may be missing, and the probe of motion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from video_sets import write_video_set

from common.errors import UserError
from common.metrics import psnr
from step1_gfdm import perceptual_metrics
from step1_gfdm.dataset import VideoClips
from step1_gfdm.eval import COPY, VAE_LIMIT, Scores, metric_table, read_clips, video_grid
from step1_gfdm.perceptual_metrics import MetricUnavailable, VideoFeatureExtractor, frechet, frechet_ci
from step1_gfdm.probe import ProbeData, fit_probes


def videos(count: int = 12) -> dict[str, torch.Tensor]:
    """Clips of a moving square, with a good forecast and a copy of the first frame."""
    truth = torch.full((count, 4, 3, 32, 32), 0.2)
    for clip in range(count):
        for frame in range(4):
            truth[clip, frame, :, 4 + clip : 12 + clip, 2 + 6 * frame : 10 + 6 * frame] = 0.9
    return {
        "truth": truth,
        COPY: truth[:, :1].expand_as(truth),
        VAE_LIMIT: truth + 0.01,
        "good": truth + 0.02 * torch.randn_like(truth),
    }


def test_scores_by_clip_and_by_frame() -> None:
    scores = Scores({"psnr": psnr}, None)
    shown = videos()
    for part in (slice(0, 5), slice(5, 12)):
        scores.add({name: video[part] for name, video in shown.items()})
    assert np.allclose(
        scores.by_clip("good", "psnr"),
        psnr(shown["good"][:, 1:].flatten(0, 1), shown["truth"][:, 1:].flatten(0, 1)).view(12, 3).mean(1),
    )
    by_frame = scores.by_frame()
    assert len(by_frame[COPY]["psnr"]) == 3 and by_frame[COPY]["psnr"][0] > by_frame[COPY]["psnr"][2], (
        "a copy gets worse with time"
    )
    summary = scores.summarize()
    assert summary[COPY]["psnr_gain"]["mean"] == 0 and summary["good"]["psnr_gain"]["low"] > 5
    said = metric_table(summary, 12, ["A note."])
    assert "A note." in said and "| good |" in said and "Fréchet" not in said and "LPIPS" not in said


def test_the_frechet_distance_ranks_forecasts_and_names_its_network(hub: Path) -> None:
    feature_extractor = VideoFeatureExtractor(hub / "dinov2", 32, torch.device("cpu"))
    assert str(hub) in feature_extractor.name
    scores = Scores({"psnr": psnr}, feature_extractor)
    scores.add(videos(16))
    summary = scores.summarize()
    assert summary["good"]["frechet"]["mean"] < summary[COPY]["frechet"]["mean"] and "Fréchet" in metric_table(
        summary, 16
    )


def test_frechet_is_that_of_gaussians() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(4000, 3), torch.randn(4000, 3) * 2 + torch.tensor([1.0, 0.0, 0.0])
    assert frechet(one, one) == pytest.approx(0, abs=1e-3)
    assert frechet(other, one) == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.1)
    value, low, high = frechet_ci(other[:200], one[:200], resamples=20)
    assert low < high and value > 2


def test_weights_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MetricUnavailable, match="Fréchet distance is left out.*none"):
        VideoFeatureExtractor(tmp_path / "none", 32, torch.device("cpu"))

    def offline(*_: object, **__: object) -> None:
        raise OSError("no net")

    monkeypatch.setattr(perceptual_metrics, "learned_perceptual_image_patch_similarity", offline)
    with pytest.raises(MetricUnavailable, match="torchvision's alex weights .*no net"):
        perceptual_metrics.lpips("alex")


def test_video_grid() -> None:
    clips = [{"truth": torch.rand(4, 3, 15, 16), "guess": torch.rand(4, 3, 15, 16)} for _ in range(3)]
    assert video_grid(clips).shape == (4, 44, 32, 3) and video_grid(clips).dtype == np.uint8


def test_clips_return_the_robots_readings(tmp_path: Path) -> None:
    root = write_video_set(tmp_path, 2)
    file = root / "annotation/train/1.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "state": [[float(frame), 0.0, 0.0] for frame in range(20)]})
    )
    clips = VideoClips(root, "train", num_frames=3, clip={"span": "episode"}, image_size=32)
    assert clips.states(0) is None and clips.states(1)[:, 0].tolist() == [0, 9, 19]


def test_the_probe_finds_motion_only_where_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    displacement = torch.randn(300, 3, generator=generator) * 0.05
    noise = torch.randn(300, 200, generator=generator)
    informative = noise + displacement @ torch.randn(3, 200, generator=generator) * 20
    results = fit_probes(ProbeData({"features": informative, "present": noise}, displacement))
    for kind in ("linear", "mlp"):
        assert (
            results["features"][kind][1] > 0.5
            and results["present"][kind][0] < 0.15
            and results["difference"][kind][1] > 0.3
        )
    curved = torch.cat([displacement.sign() * (displacement.abs() * 20) ** 3, noise[:, :10]], dim=1)
    assert fit_probes(ProbeData({"features": curved, "present": noise}, displacement))["features"]["mlp"][0] > 0.3
    with pytest.raises(ValueError, match="10 readable clips.*probe= to 20"):
        fit_probes(ProbeData({"features": informative[:10], "present": noise[:10]}, displacement[:10]))


def test_a_set_without_readable_clips_is_named(tmp_path: Path) -> None:
    root = write_video_set(tmp_path, 1)
    (root / "videos/train/0/0.mp4").unlink()
    clips = VideoClips(root, "train", num_frames=3, clip={"span": "episode"}, image_size=32)
    with pytest.raises(UserError, match="no clip can be read; the last message: .*no such video"):
        read_clips(clips, 4, seed=0)
