"""Video: written frames are read back, and bad files end in one line."""

from __future__ import annotations

import decord
import numpy as np
import pytest
import torch

from common.metrics import bootstrap_ci, psnr, ssim
from common.video import VideoError, probe, read_batches, read_frames, resize, write_mp4


def moving_square(count: int = 12) -> np.ndarray:
    frames = np.full((count, 48, 64, 3), 40, np.uint8)
    for t in range(count):
        frames[t, 10:30, 2 * t : 2 * t + 20] = (200, 60, 60)
    return frames


def test_written_frames_come_back(tmp_path):
    frames = moving_square()
    write_mp4(tmp_path / "a.mp4", frames, fps=30)
    assert probe(tmp_path / "a.mp4") == (12, 30.0, (48, 64))
    back = read_frames(tmp_path / "a.mp4", [0, 7, 11])
    assert back.shape == (3, 48, 64, 3)
    assert np.abs(back.astype(int) - frames[[0, 7, 11]]).mean() < 4
    assert not list(tmp_path.glob(".*part*"))


@pytest.mark.parametrize("content, reason", [(b"", "empty file"), (b"\x00" * 400, "cannot be decoded")])
def test_bad_files(tmp_path, content, reason):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=f"bad.mp4: {reason}"):
        read_frames(tmp_path / "bad.mp4")
    with pytest.raises(VideoError, match="no such video"):
        read_frames(tmp_path / "none.mp4")


def test_truncated_video_and_frames_past_the_end(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving_square(), fps=30)
    with pytest.raises(VideoError, match="frames 3..12 asked of a video of 12"):
        read_frames(tmp_path / "a.mp4", [3, 12])
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="cut.mp4"):
        read_frames(tmp_path / "cut.mp4")


def test_real_formats(shared_data):
    """VP9 webm with an odd width and mpeg4, as the published sets hold them."""
    for file in [
        *sorted((shared_data / "video_samples/sthv2").rglob("*.webm"))[:1],
        *sorted((shared_data / "video_samples/bridge").rglob("*.mp4"))[:1],
    ]:
        count, fps, size = probe(file)
        assert read_frames(file, [0, count - 1]).shape == (2, *size, 3) and fps > 0


def test_resize_rules():
    frames = moving_square(2)
    assert resize(frames, 32).shape == (2, 3, 32, 32) and resize(frames, 32).max() <= 1
    assert not torch.allclose(resize(frames, 32, "crop"), resize(frames, 32))
    with pytest.raises(ValueError, match="squeeze or crop"):
        resize(frames, 32, "stretch")


def test_picture_metrics_and_intervals():
    truth = torch.rand(3, 3, 32, 32)
    noisy = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    assert (psnr(truth, truth) > 90).all() and (psnr(noisy, truth) < 30).all()
    assert torch.allclose(ssim(truth, truth), torch.ones(3), atol=1e-4) and (ssim(noisy, truth) < 0.99).all()
    mean, low, high = bootstrap_ci(np.random.default_rng(0).normal(1, 1, 400))
    assert low < mean < high and 0.15 < high - low < 0.25


@pytest.mark.parametrize("decord_works", [True, False])
def test_batches_are_the_frames_in_order(tmp_path, monkeypatch, decord_works):
    write_mp4(tmp_path / "a.mp4", moving_square(), fps=30)
    whole = read_frames(tmp_path / "a.mp4")
    if not decord_works:
        monkeypatch.setattr(
            "common.video.decord.VideoReader", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no such codec"))
        )
    batches = list(read_batches(tmp_path / "a.mp4", 1, 9, 4))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert np.abs(np.concatenate(batches).astype(int) - whole[1:10]).max() <= (0 if decord_works else 8)
    with pytest.raises(VideoError, match="asked of a video of 12"):
        list(read_batches(tmp_path / "a.mp4", 4, 12, 4))


def test_batches_continue_with_pyav_where_decord_fails(tmp_path, monkeypatch):
    write_mp4(tmp_path / "a.mp4", moving_square(), fps=30)
    whole = read_frames(tmp_path / "a.mp4")

    class Tired(decord.VideoReader):
        def get_batch(self, indices):
            if indices[0] >= 4:
                raise RuntimeError("broken")
            return super().get_batch(indices)

    monkeypatch.setattr("common.video.decord.VideoReader", Tired)
    batches = np.concatenate(list(read_batches(tmp_path / "a.mp4", 0, 11, 4)))
    assert batches.shape == whole.shape and np.abs(batches.astype(int) - whole).max() <= 8
