"""Clips, mixtures and unreadable samples; real Bridge latents where they are there."""

import json

import numpy as np
import pytest
import torch
from video_sets import write_video_set

from common.errors import UnreadableSample
from step1_gfdm.dataset import ClipRule, LatentClips, VideoClips, build_mixture

SHAPE = (4, 8, 8)
STRIDE = {"stride": 2, "step_between_clips": 2}


def rng(seed=0):
    return np.random.default_rng(seed)


def test_whole_episode_is_squeezed_as_vpp():
    rule = ClipRule(span="episode")
    assert rule.count(40) == 1
    assert rule.frames(40, 0, 16).tolist() == np.linspace(0, 39, 16).astype(int).tolist()
    assert rule.frames(40, 0, 16)[[0, -1]].tolist() == [0, 39]


def test_stride_walks_and_pads_its_tail():
    rule = ClipRule(**STRIDE)
    assert rule.count(20) == 10
    assert rule.frames(20, 3, 4).tolist() == [6, 8, 10, 12]
    assert rule.frames(20, 9, 4).tolist() == [18, 19, 19, 19]
    assert rule.frames(61, 0, 16)[-1] == 30  # CALVIN at 30 Hz: one second


@pytest.mark.parametrize("wrong", [{}, {"span": "half"}, {"span": "episode", "stride": 2}, {"stride": 0}])
def test_wrong_clip_rules(wrong):
    with pytest.raises(ValueError, match="stride"):
        ClipRule(**wrong)


def test_samples_are_the_right_frames_text_and_camera(tmp_path):
    videos = LatentClips(
        write_video_set(tmp_path, cameras=2, latent_shape=SHAPE),
        num_frames=4,
        clip=STRIDE,
        views={0: 0.75, 1: 0.25},
        latent_shape=SHAPE,
    )
    assert len(videos) == 30
    sample = videos.sample(13, rng(1))
    assert sample["latents"].shape == (4, *SHAPE) and sample["latents"].dtype == torch.float32
    assert sample["text"] == "move square 1"
    assert (sample["latents"][:, 0, 0, 0] % 1000).tolist() == [6, 8, 10, 12]
    assert torch.equal(sample["latents"], videos.sample(13, rng(1))["latents"])
    second = [videos.sample(0, rng(i))["latents"][0, 0, 0, 0].item() >= 1000 for i in range(400)]
    assert 0.18 < np.mean(second) < 0.32
    with pytest.raises(IndexError):
        videos.sample(30, rng())


def test_long_videos_are_dropped_on_request(tmp_path):
    write_video_set(tmp_path, 2, length=20, latent_shape=SHAPE)
    with_limit = LatentClips(tmp_path, num_frames=4, clip={"span": "episode"}, max_frames=19, latent_shape=SHAPE)
    assert len(with_limit) == 0
    assert len(LatentClips(tmp_path, num_frames=4, clip={"span": "episode"}, max_frames=20, latent_shape=SHAPE)) == 2


def test_sets_without_a_val_folder_hold_videos_out(tmp_path):
    write_video_set(tmp_path, 22, length=2, latent_shape=SHAPE, val_folder=False)
    train, val = (
        LatentClips(tmp_path, split, num_frames=2, clip=STRIDE, latent_shape=SHAPE) for split in ("train", "val")
    )
    assert len(val.files) == 2 and not set(val.files) & set(train.files) and len(train.files) == 20


def test_real_bridge_latents(shared_data):
    """Their annotations name latent_videos/, but the files are in latent_videos_svd/."""
    videos = LatentClips(
        shared_data / "video_samples/bridge", "val", num_frames=16, clip={"span": "episode"}, max_frames=100
    )
    assert len(videos) == 3
    for index in range(3):
        sample = videos.sample(index, rng())
        assert sample["latents"].shape == (16, 4, 32, 32) and 0.5 < sample["latents"].std() < 1.0
    assert {videos.sample(i, rng())["text"] for i in range(3)} >= {"put the broccoli next to the bowl"}
    with pytest.raises(UnreadableSample, match=r"holds \(24, 4, 32, 32\), needs \(T, 12, 8, 8\)"):
        LatentClips(
            shared_data / "video_samples/bridge",
            "val",
            num_frames=16,
            clip={"span": "episode"},
            latent_shape=(12, 8, 8),
        ).sample(0, rng())


@pytest.mark.parametrize("name, frames", [("bridge", 24), ("rt1", 57), ("sthv2", 47)])
def test_real_videos(shared_data, name, frames):
    clips = VideoClips(shared_data / "video_samples" / name, "val", num_frames=8, clip=STRIDE, image_size=64)
    sample = clips.sample(0, rng())
    assert sample["frames"].shape == (8, 3, 64, 64) and sample["frames"].min() >= 0 and sample["frames"].max() <= 1
    assert sample["frames"].std() > 0.05 and sample["text"]
    last = clips.sample(-(-frames // 2) - 1, rng())["frames"]  # the last clip of the first video is its padded tail
    assert torch.equal(last[-1], last[-2])


def broken(tmp_path, change):
    write_video_set(tmp_path, 1, latent_shape=SHAPE)
    file = tmp_path / "annotation/train/0.json"
    change(tmp_path, file, json.loads(file.read_text()))
    return LatentClips(tmp_path, num_frames=4, clip=STRIDE, latent_shape=SHAPE)


def save(value):
    return lambda root, file, record: torch.save(value, root / "latent_videos/train/0/0.pt")


def edit(**fields):
    return lambda root, file, record: file.write_text(json.dumps({**record, **fields}))


def drop(key):
    return lambda root, file, record: file.write_text(json.dumps({k: v for k, v in record.items() if k != key}))


class Evil:
    def __reduce__(self):
        return (eval, ("1/0",))


@pytest.mark.parametrize(
    "change, says",
    [
        (drop("texts"), "has no sentence"),
        (edit(texts=[]), "has no sentence"),
        (lambda root, file, record: file.write_text("{"), "is not readable JSON"),
        (save(torch.zeros(20, 4, 4, 4)), r"holds \(20, 4, 4, 4\), needs \(T, 4, 8, 8\)"),
        (save(torch.full((20, *SHAPE), float("nan"))), "NaN"),
        (save(torch.zeros(7, *SHAPE)), "holds 7 frames, its annotation says 20"),
        (save({"a": 1}), "holds dict"),
        (save(Evil()), "is not a latent file"),
        (
            lambda root, file, record: (root / "latent_videos/train/0/0.pt").write_bytes(b"PK torn"),
            "is not a latent file",
        ),
        (lambda root, file, record: (root / "latent_videos/train/0/0.pt").unlink(), "are missing; make them with"),
        (edit(latent_videos=[{"latent_video_path": "../../secret.pt"}]), "points outside its set"),
        (edit(latent_videos=[{"latent_video_path": "/etc/passwd"}]), "points outside its set"),
        (edit(latent_videos=[{}]), "has no latent_video_path"),
    ],
)
def test_bad_samples_are_named(tmp_path, change, says):
    videos = broken(tmp_path, change)
    assert len(videos) > 0
    with pytest.raises(UnreadableSample, match=says) as caught:
        videos.sample(0, rng())
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_camera_too_many_is_named(tmp_path):
    write_video_set(tmp_path, 1, latent_shape=SHAPE)
    with pytest.raises(UnreadableSample, match="has 1 cameras, and camera 1 was drawn; set the views of this set"):
        LatentClips(tmp_path, num_frames=4, clip=STRIDE, latent_shape=SHAPE, views={1: 1.0}).sample(0, rng())


def test_missing_video_is_named(tmp_path):
    write_video_set(tmp_path, 1)
    (tmp_path / "videos/train/0/0.mp4").unlink()
    with pytest.raises(UnreadableSample, match="no such video"):
        VideoClips(tmp_path, "train", num_frames=4, clip=STRIDE, image_size=32).sample(0, rng())


def test_absent_folders_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="scripts/playtable_record.sh"):
        LatentClips(tmp_path / "nowhere", num_frames=4, clip=STRIDE)
    write_video_set(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="scripts/step1_prepare_data_latent.sh videos="):
        LatentClips(tmp_path, num_frames=4, clip=STRIDE)


def test_mixture_draws_by_weight_and_keeps_a_part_of_human_video(tmp_path):
    write_video_set(tmp_path / "robot", 2, latent_shape=SHAPE)
    write_video_set(tmp_path / "ego", 10, latent_shape=SHAPE)
    sets = {
        "robot": {"weight": 3, "clip": STRIDE},
        "human": {"folder": "ego", "weight": 1, "clip": {"span": "episode"}, "human": True},
    }

    def mix(human_fraction, sets=sets, **options):
        return build_mixture(tmp_path, sets, num_frames=4, latent_shape=SHAPE, human_fraction=human_fraction, **options)

    for fraction, share, kept in ((1.0, 1 / 4, 10), (0.5, 1 / 7, 5), (0.2, 1 / 16, 2)):
        drawn = [mix(fraction, length=77).sample(i, rng(i))["id"] for i in range(600)]
        assert np.mean(["ego" in id for id in drawn]) == pytest.approx(share, abs=0.05)
        assert len({id for id in drawn if "ego" in id}) == kept, "the amount, not only the weight"
        assert len(mix(fraction, length=77)) == 77 and len(mix(fraction)) == len(mix(1.0)), (
            "an epoch is equally long whatever is kept"
        )
    away = {**sets, "human": {**sets["human"], "folder": "not there"}}
    without = mix(0, away, length=77)
    assert all("robot" in without.sample(i, rng(i))["id"] for i in range(20))
    assert mix(0).names == ["robot"] and len(mix(0)) == len(mix(1.0)) > len(mix(1.0, {"robot": sets["robot"]}))
    with pytest.raises(FileNotFoundError, match=r"not there.*set 'human'.*give data.length"):
        mix(0, away)
    with pytest.raises(ValueError, match=r"human_fraction=0.2, but no set of this mixture is marked human \(robot\)"):
        mix(0.2, {"robot": sets["robot"]})
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        build_mixture(tmp_path, sets, num_frames=4, latent_shape=SHAPE, human_fraction=1.5)
