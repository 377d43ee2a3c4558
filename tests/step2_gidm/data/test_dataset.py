"""Transitions: gaps by the frame rate of each set, never clamped; one line for each bad input; Table 12's mixture."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorflow_datasets.proto import tf_example_pb2

from common import rlds
from common.calvin_format import CalvinFormatError, read_annotations, read_recordings
from common.errors import FilteredSample, MissingFileError, UnreadableSample, UserError
from common.video import write_mp4
from step1_gfdm.dataset import VideoClips
from step2_gidm.data import dataset
from step2_gidm.data.dataset import build_mixture, build_open_x_mixture
from step2_gidm.data.oxe import HUMAN_SHARE, OXE, official_windows
from step2_gidm.data.pairs import Transitions, augment_frames
from step2_gidm.data.transitions import CalvinTransitions, RldsTransitions, VideoTransitions
from tests.common.test_rlds import record, write_rlds
from tests.step3_defi.parts import write_calvin

PAIRS = {"image_size": 32}
TOY = {"image": "observation/image", "text": "instruction", "encoding": "code_points"}  # what write_rlds writes


def video_set(
    folder: Path, count: int = 2, *, length: int = 20, fps: float = 10.0, split: str = "train", views: int = 1
) -> Path:
    """Clips whose brightness counts the frames: frame t of view v has brightness 8 t + v."""
    (folder / "annotation" / split).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        paths = [f"videos/{split}/{i}/{view}.mp4" for view in range(views)]
        for view, path in enumerate(paths):
            frames = np.stack([np.full((32, 48, 3), (8 * t + view) % 256, np.uint8) for t in range(length)])
            write_mp4(folder / path, frames, fps, crf=0)
        record = {"texts": [f"Sentence {i}"], "videos": [{"video_path": path} for path in paths], "episode_id": str(i)}
        (folder / "annotation" / split / f"{i}.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "fps, gap_seconds, n", [(3, 1.0, 3), (5, 1.0, 5), (3.75, 1.0, 4), (30, 1.0, 30), (0.4, 1.0, 1), (30, 0.5, 15)]
)
def test_gap_is_a_second_by_the_sets_own_clock(fps: float, gap_seconds: float, n: int) -> None:
    pairs = Transitions(image_size=8, gap_seconds=gap_seconds)
    rng = np.random.default_rng(0)
    drawn = {pairs.sample_frame_indices("x", 40, fps, rng)[0] for _ in range(2000)}
    assert {end - start for start, end in drawn} == {n}
    assert {start for start, _ in drawn} == set(range(40 - n)), (
        "every start inside the episode is drawn, none is clamped"
    )


def test_short_episodes_give_their_longest_pair_or_are_reported() -> None:
    rng = np.random.default_rng(0)
    assert Transitions(image_size=8).sample_frame_indices("x", 7, 10, rng) == [(0, 6)]
    with pytest.raises(FilteredSample, match="x: 5 frames are too few for pairs 10 apart"):
        Transitions(image_size=8).sample_frame_indices("x", 5, 10, rng)
    with pytest.raises(UnreadableSample):
        Transitions(image_size=8, min_gap=1.0).sample_frame_indices("x", 10, 10, rng)
    with pytest.raises(UnreadableSample, match="1 frames"):
        Transitions(image_size=8).sample_frame_indices("x", 1, 1, rng)


def test_jitter_varies_the_gap_within_its_bounds() -> None:
    rng = np.random.default_rng(0)
    pairs = Transitions(image_size=8, jitter=0.2)
    gaps = {end - start for start, end in pairs.sample_frame_indices("x", 100, 30, rng, 500)}
    assert min(gaps) == 24 and max(gaps) == 36
    wide = Transitions(image_size=8, jitter=0.6)
    gaps = [end - start for start, end in wide.sample_frame_indices("x", 1000, 10, rng, 2000)]
    assert min(gaps) == 5 and max(gaps) == 16, "no drawn gap makes a long episode too short"
    assert {wide.sample_frame_indices("x", 7, 10, rng)[0] for _ in range(300)} <= {(0, 6), (0, 5), (1, 6)}
    with pytest.raises(UnreadableSample, match="x: 5 frames are too few"):
        wide.sample_frame_indices("x", 5, 10, rng)


def test_several_pairs_of_an_episode_are_spread_over_it() -> None:
    pairs, rng = Transitions(image_size=8), np.random.default_rng(0)
    assert sorted(pairs.sample_frame_indices("x", 14, 10, rng, 4)) == [(0, 10), (1, 11), (2, 12), (3, 13)], (
        "as many as there are: every one"
    )
    counts = np.bincount(
        [start for _ in range(3000) for start, _ in pairs.sample_frame_indices("x", 15, 10, rng, 3)], minlength=5
    )
    assert np.allclose(counts / counts.sum(), 0.2, atol=0.02)
    assert all(len({start for start, _ in pairs.sample_frame_indices("x", 17, 10, rng, 5)}) == 5 for _ in range(200))
    assert {start for start, _ in pairs.sample_frame_indices("x", 12, 10, rng, 5)} == {0, 1}


def test_official_gap_is_a_window_that_the_episode_cuts_off() -> None:
    pairs, rng = Transitions(image_size=8, gap="official", window=10), np.random.default_rng(0)
    drawn = {pairs.sample_frame_indices("x", 12, 30, rng)[0] for _ in range(1000)}
    assert drawn == {(t, min(t + 9, 11)) for t in range(12)}
    assert Transitions(image_size=8, gap="official").sample_frame_indices("x", 1, 30, rng) == [(0, 0)], (
        "the release keeps frames beside themselves"
    )
    with pytest.raises(UserError, match="unknown gap 'offical'; use one of seconds, official"):
        Transitions(image_size=8, gap="offical")
    with pytest.raises(UserError, match="a window of 1 frames holds no pair"):
        Transitions(image_size=8, gap="official", window=1)
    with pytest.raises(UnreadableSample, match="without frames"):
        Transitions(image_size=8, gap="official").sample_frame_indices("x", 0, 30, rng)


def test_official_windows_follow_the_lists_of_the_release() -> None:
    slow = {"fractal", "berkeley_autolab_ur5", "nyu_franka_play", "ucsd_kitchen", "dlr_edan", "dobbe"}
    fast = {"toto", "viola", "austin_sailor", "iamlab_pickup_insert", "utaustin_mutex"}
    ranges = {name: range(3, 6) if name in slow else range(15, 21) if name in fast else range(10, 11) for name in OXE}
    many = [official_windows(seed) for seed in range(200)]
    assert all({draw[name] for draw in many} == set(windows) for name, windows in ranges.items())
    assert official_windows() == official_windows(), "one draw a run"


@pytest.mark.parametrize("fps, distance", [(30, 15), (2, 1), (1, 1)])
def test_official_ego4d_pairs_lie_half_a_second_apart_at_any_rate(tmp_path: Path, fps: float, distance: int) -> None:
    human = video_set(tmp_path / "ego4d", 3, length=20, fps=fps)
    clips = build_open_x_mixture(tmp_path, human_root=human, names=[], gap="official", image_size=32).sets[0]
    drawn = {clips.sample_frame_indices("x", 20, fps, np.random.default_rng(seed))[0] for seed in range(300)}
    assert drawn == {(t, min(t + distance, 19)) for t in range(20)}
    assert clips.episode_pairs(0, 1)["frames"].mean((2, 3, 4)).mul(255 / 8).round().diff(dim=1).item() == distance
    with pytest.raises(UnreadableSample, match="frame rate is unknown"):
        clips.sample_frame_indices("x", 20, 0, np.random.default_rng(0))


def test_video_pairs_are_the_frames_they_say(tmp_path: Path) -> None:
    samples = VideoTransitions(video_set(tmp_path / "toy", 3, views=2), view=None, **PAIRS)
    rng = np.random.default_rng(0)
    views = set()
    for _ in range(12):
        sample = samples.sample(0, rng)
        place, gap = sample["id"].split("@")[1].split("+")
        view = int(sample["id"].split("@")[0].split("/")[-1])
        views.add(view)
        brightness = sample["frames"].mean((1, 2, 3)) * 255
        assert gap == "10" and torch.allclose(
            brightness, torch.tensor([8.0 * int(place) + view, 8.0 * (int(place) + 10) + view]), atol=2
        )
    assert views == {0, 1} and sample["frames"].shape == (2, 3, 32, 32) and sample["text"] == "Sentence 1"
    assert samples.sample(1, np.random.default_rng(5))["id"] == samples.sample(1, np.random.default_rng(5))["id"]


def test_fps_overrides_the_container(tmp_path: Path) -> None:
    folder = video_set(tmp_path / "toy")
    assert VideoTransitions(folder, fps=4, **PAIRS).sample(0, np.random.default_rng(0))["id"].endswith("+4")


def test_labelled_pairs_say_what_they_are_of(tmp_path: Path) -> None:
    folder = video_set(tmp_path / "toy", views=2)
    file = folder / "annotation/train/1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": [[float(t), 0.0, 0.0] for t in range(20)]}))
    samples = VideoTransitions(folder, view=1, labelled=True, **PAIRS)
    samples.files = [folder / "annotation/train/0.json", file]
    rng = np.random.default_rng(0)
    plain, pair = samples.sample(0, rng), samples.sample(1, rng)
    start = int(pair["id"].split("@")[1].split("+")[0])
    assert pair["state"][:, 0].tolist() == [start, start + 10] and pair["phase"] == start / 19 and pair["view"] == 1
    assert (
        "state" not in plain and plain["scene"] == pair["scene"] == str(folder) and plain["episode"] != pair["episode"]
    )
    assert set(VideoTransitions(folder, **PAIRS).sample(0, rng)) == {"id", "frames", "text"}, (
        "training batches have the same keys everywhere"
    )
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": [[0.0]] * 3}))
    with pytest.raises(UnreadableSample, match="3 readings of the robot for 20 frames"):
        samples.sample(1, rng)


def test_scenes_are_told_apart_within_a_set(tmp_path: Path) -> None:
    folder, rng = video_set(tmp_path / "toy", 3), np.random.default_rng(0)  # episode 0 is held out
    file = folder / "annotation/train/2.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scene": "calvin_scene_B"}))
    samples = VideoTransitions(folder, labelled=True, **PAIRS)
    assert [samples.sample(i, rng)["scene"] for i in range(2)] == [str(folder), "calvin_scene_B"]
    root = write_calvin(tmp_path / "calvin") / "training"  # recordings from frames 100, 145, 190, 235
    assert CalvinTransitions(root, fps=10, labelled=True, **PAIRS).sample(0, rng)["scene"] == str(root)
    np.save(
        root / "scene_info.npy",
        np.array({"calvin_scene_B": [100, 189], "calvin_scene_A": [190, 230]}, dtype=object),
        allow_pickle=True,
    )
    samples = CalvinTransitions(root, fps=10, labelled=True, **PAIRS)
    samples.segments = [note for note, _ in read_annotations(root, read_recordings(root))]
    assert [samples.sample(i, rng)["scene"] for i in range(4)] == [
        "calvin_scene_B",
        "calvin_scene_B",
        "calvin_scene_A",
        str(root),
    ]
    np.save(root / "scene_info.npy", np.array([rng], dtype=object), allow_pickle=True)
    with pytest.raises(CalvinFormatError, match="scene_info.npy cannot be read: it asks for"):
        CalvinTransitions(root, fps=10, **PAIRS)


def test_a_walk_shows_the_pairs_of_a_clip_in_order(tmp_path: Path) -> None:
    clip = VideoTransitions(video_set(tmp_path / "toy"), **PAIRS).episode_pairs(0, 5)
    brightness = (clip["frames"].mean((2, 3, 4)) * 255 / 8).round()
    assert (
        brightness[:, 0].tolist() == [0, 2, 4, 7, 9]
        and (brightness[:, 1] - brightness[:, 0] == 10).all()
        and clip["text"] == "Sentence 1"
    )
    assert len(VideoTransitions(video_set(tmp_path / "toy"), **PAIRS).episode_pairs(0, 50)["frames"]) == 10, (
        "no pair is shown twice"
    )
    with pytest.raises(UnreadableSample, match="too few"):
        VideoTransitions(video_set(tmp_path / "short", length=3), **PAIRS).episode_pairs(0, 5)


def test_every_kind_of_set_walks(tmp_path: Path) -> None:
    toy = RldsTransitions(write_rlds(tmp_path / "toy" / "1.0.0", shards=(2, 1)), fps=1, augment=True, **TOY, **PAIRS)
    clip = toy.episode_pairs(1, 2)
    assert (clip["frames"].mean((2, 3, 4)) * 255).round().tolist() == [[20, 21], [22, 23]] and clip["text"] == "päck"
    assert len(toy.episode_pairs(1, 50)["frames"]) == 3 and clip["id"] == "toy/2"
    root = write_calvin(tmp_path / "calvin", recordings=2) / "training"
    samples = CalvinTransitions(root, fps=10, view=None, **PAIRS)
    note, clip = samples.segments[0], samples.episode_pairs(0, 3)
    for pair, start in zip(clip["frames"], (note.start, note.start + 11, note.end - 10), strict=True):
        for image, frame in zip(pair, (start, start + 10)):
            with np.load(root / f"episode_{frame:07d}.npz") as archive:
                assert abs(archive["rgb_static"].mean() / 255 - image.mean()) < 0.02
    cut = VideoTransitions(video_set(tmp_path / "clips"), gap="official", window=15, **PAIRS).episode_pairs(0, 50)
    gaps = (cut["frames"].mean((2, 3, 4)) * 255 / 8).round().diff(dim=1)
    assert len(gaps) == 6 and (gaps == 14).all(), "a film of windows that the episode does not cut off"


def test_splits(tmp_path: Path) -> None:
    folder = video_set(tmp_path / "toy", 21, length=12)
    train, val = (VideoTransitions(folder, split, **PAIRS) for split in ("train", "val"))
    assert [file.stem for file in val.files] == ["0", "9"] and len(train) == 19, (
        "the first and the 21st in the order of names"
    )
    assert not set(train.files) & set(val.files)
    video_set(folder, 2, split="val")
    assert len(VideoTransitions(folder, "train", **PAIRS)) == 21 and len(VideoTransitions(folder, "val", **PAIRS)) == 2
    with pytest.raises(MissingFileError, match="annotation/test: there are no .json files here; there is train"):
        VideoTransitions(video_set(tmp_path / "other"), "test", **PAIRS)
    with pytest.raises(
        MissingFileError, match="there are no .json files here; a video set holds annotation/train/<id>.json"
    ):
        VideoTransitions(tmp_path / "nowhere", **PAIRS)


def test_a_set_that_has_only_a_val_split_is_shared_out_when_told_to(tmp_path: Path) -> None:
    folder = video_set(tmp_path / "toy", 5, length=3, split="val")
    with pytest.raises(MissingFileError, match="there is val, which only_split=val divides"):
        VideoTransitions(folder, **PAIRS)
    train, val = (VideoTransitions(folder, split, only_split="val", **PAIRS) for split in ("train", "val"))
    assert [file.stem for file in train.files] == list("1234") and [file.stem for file in val.files] == ["0"]
    assert len(VideoTransitions(folder, "val", **PAIRS)) == 5, "not told to, it is the val split"


def test_fractions_lie_inside_one_another_and_are_the_forward_models(tmp_path: Path) -> None:
    folder = video_set(tmp_path / "toy", 19, length=2)
    kept = {share: VideoTransitions(folder, fraction=share, **PAIRS) for share in (0.0, 0.01, 0.2, 0.4, 0.8, 1.0)}
    assert [len(each) for each in kept.values()] == [0, 1, 4, 7, 14, 18] and {
        each.unfiltered_length for each in kept.values()
    } == {18}
    for less, more in itertools.pairwise(kept.values()):
        assert set(less.files) < set(more.files) and less.files == sorted(less.files)
    for split in ("train", "val"):
        forward = VideoClips(folder, split, num_frames=1, clip={"stride": 1}, image_size=32, fraction=0.4)
        assert forward.files == VideoTransitions(folder, split, fraction=0.4, **PAIRS).files, "one rule for both models"


def test_bad_clips_are_one_line(tmp_path: Path) -> None:
    folder = video_set(tmp_path / "toy", 6)
    note = folder / "annotation" / "train"
    (note / "0.json").write_text(json.dumps({"videos": [{"video_path": "x.mp4"}]}))
    (note / "1.json").write_text("{not json")
    (note / "2.json").write_text(json.dumps({"texts": ["a"]}))
    (folder / "videos/train/3/0.mp4").unlink()
    broken = folder / "videos/train/4/0.mp4"
    broken.write_bytes(broken.read_bytes()[:300])
    samples = VideoTransitions(folder, **PAIRS)
    samples.files = sorted(note.glob("*.json"))
    for index, message in enumerate(
        ["has no sentence", "is not readable JSON", "names no videos", "no such video", "toy/4: .*4/0.mp4"]
    ):
        with pytest.raises(UnreadableSample, match=message) as caught:
            samples.sample(index, np.random.default_rng(0))
        assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableSample, match="names no video for camera 1, it has 1 cameras"):
        VideoTransitions(folder, view=1, **PAIRS).sample(4, np.random.default_rng(0))


def test_no_video_is_read_from_outside_its_set(tmp_path: Path) -> None:
    folder = video_set(tmp_path / "toy", 2)
    video_set(tmp_path / "other", 1)
    for file in (folder / "annotation/train").glob("*.json"):
        file.write_text(json.dumps({"texts": ["a"], "videos": [{"video_path": "../other/videos/train/0/0.mp4"}]}))
    with pytest.raises(UnreadableSample, match="points outside its set: ../other"):
        VideoTransitions(folder, **PAIRS).sample(0, np.random.default_rng(0))


def test_augmentation_is_the_same_for_both_frames() -> None:
    image = torch.rand(1, 3, 32, 32).expand(2, -1, -1, -1)
    for seed in range(5):
        out = augment_frames(image, np.random.default_rng(seed))
        assert out.shape == image.shape and torch.equal(out[0], out[1]) and out.min() >= 0 and out.max() <= 1
        assert not torch.allclose(out[0], image[0])
    assert not torch.equal(
        augment_frames(image, np.random.default_rng(0)), augment_frames(image, np.random.default_rng(1))
    )


def test_only_training_augments(tmp_path: Path) -> None:
    folder = video_set(tmp_path / "toy", 3)
    sets = {"toy": {"video": folder}}
    for split, expected in (("train", True), ("val", False)):
        assert build_mixture(sets, split=split, augment=True, **PAIRS).sets[0].augment is expected


def test_mixture_weights_and_human_fraction(tmp_path: Path) -> None:
    robot, human = video_set(tmp_path / "robot", 10, length=3), video_set(tmp_path / "human", 10, length=3)
    sets = {"robot": {"video": robot, "weight": 3}, "human": {"video": human, "weight": 1, "human": True}}
    assert build_mixture(sets, **PAIRS).shares.tolist() == [0.75, 0.25]
    half = build_mixture(sets, human_fraction=0.5, **PAIRS)
    assert half.shares[1] == pytest.approx(0.5 / 3.5) and len(half.sets[1]) == 4 and len(half.sets[0]) == 9
    none = build_mixture(sets, human_fraction=0.0, **PAIRS)
    assert none.names == ["robot"] and len(none) == len(half) == len(build_mixture(sets, **PAIRS)) == 18, (
        "epochs are equally long"
    )
    shutil.rmtree(human)
    assert build_mixture(sets, human_fraction=0.0, length=5, **PAIRS).names == ["robot"]
    with pytest.raises(MissingFileError, match=r"set 'human'.*give data.length"):
        build_mixture(sets, human_fraction=0.0, **PAIRS)
    with pytest.raises(UserError, match=r"human_fraction=0.5, but no set of this mixture is marked human \(robot\)"):
        build_mixture({"robot": sets["robot"]}, human_fraction=0.5, **PAIRS)
    by_size = build_mixture({"a": {"video": robot}, "b": {"video": video_set(tmp_path / "b", 4, length=3)}}, **PAIRS)
    assert by_size.shares.tolist() == [0.75, 0.25]
    with pytest.raises(UserError, match="a share between 0 and 1"):
        build_mixture(sets, human_fraction=20, **PAIRS)
    with pytest.raises(UserError, match="needs one of video=<folder>, rlds=<folder>, calvin=<folder>"):
        build_mixture({"x": {"weight": 1}}, **PAIRS)


TRANSITIONS = {  # set -> (UniVLA's factor on the number of transitions, that number in OpenVLA's published statistics)
    "fractal": (0.5, 3_786_400),
    "kuka": (0.1, 8_590_000),
    "bridge": (1.0, 928_000),
    "taco_play": (2.0, 237_798),
    "jaco_play": (1.0, 77_965),
    "berkeley_cable_routing": (1.0, 42_328),
    "roboturk": (2.0, 187_507),
    "viola": (2.0, 76_324),
    "berkeley_autolab_ur5": (2.0, 97_939),
    "toto": (1.0, 325_699),
    "language_table": (0.1, 7_045_476),
    "stanford_hydra": (2.0, 358_234),
    "austin_buds": (1.0, 34_112),
    "nyu_franka_play": (3.0, 44_875),
    "furniture_bench": (0.1, 3_948_057),
    "ucsd_kitchen": (2.0, 3_970),
    "austin_sailor": (1.0, 353_094),
    "austin_sirius": (1.0, 279_939),
    "dlr_edan": (1.0, 8_928),
    "iamlab_pickup_insert": (1.0, 146_241),
    "utaustin_mutex": (1.0, 361_883),
    "berkeley_fanuc": (2.0, 62_613),
    "cmu_stretch": (1.0, 25_016),
    "bc_z": (0.2, 6_015_535),
    "fmb": (1.0, 1_137_459),
    "dobbe": (0.2, 1_139_911),
}  # Kuka and Bridge: the numbers that the paper's shares imply
HUMAN_TRANSITIONS = 406_000  # of Ego4D, implied by its share


def test_table_12() -> None:
    assert len(OXE) == 26 and OXE.keys() == TRANSITIONS.keys()
    assert sum(row.share for row in OXE.values()) + HUMAN_SHARE == pytest.approx(99.9)
    sizes = {name: factor * count for name, (factor, count) in TRANSITIONS.items()} | {"ego4d": HUMAN_TRANSITIONS}
    paper = {name: row.share for name, row in OXE.items()} | {"ego4d": HUMAN_SHARE}
    shares = {name: 100 * size / sum(sizes.values()) for name, size in sizes.items()}
    off = {name: round(share - paper[name], 2) for name, share in shares.items() if abs(share - paper[name]) > 0.13}
    assert not off, f"weight x transitions does not give the paper's share (difference): {off}"
    assert HUMAN_SHARE == 3.5 and sum(sizes.values()) == pytest.approx(11.6e6, rel=1e-3), (
        "transitions that 100 % stand for"
    )


def test_calvin_pairs_lie_inside_their_annotation(tmp_path: Path) -> None:
    root = write_calvin(tmp_path / "calvin", recordings=4)  # annotated from the 3rd to the 35th of 40 frames
    samples, rng = CalvinTransitions(root / "training", fps=10, view=None, **PAIRS), np.random.default_rng(0)
    val = CalvinTransitions(root / "training", "val", **PAIRS)
    assert (len(samples), len(val)) == (3, 1) and val.segments[0].start not in [note.start for note in samples.segments]
    seen = set()
    for _ in range(60):
        index = int(rng.integers(3))
        sample = samples.sample(index, rng)
        name, rest = sample["id"].rsplit("/", 1)
        start, (view, gap) = int(name.split("/")[-1]), rest.split("+")
        note = samples.segments[index]
        assert (
            note.start <= start
            and start + int(gap) <= note.end
            and gap == "10"
            and sample["text"] == note.text
            and sample["text"]
        )
        for image, frame in zip(sample["frames"], (start, start + 10)):
            with np.load(root / f"training/episode_{frame:07d}.npz") as archive:
                assert abs(archive[f"rgb_{view}"].mean() / 255 - image.mean()) < 0.02
        seen.add(view)
    assert seen == {"static", "gripper"} and samples.sample(0, rng)["frames"].shape == (2, 3, 32, 32)
    assert (
        build_mixture({"calvin": {"calvin": root / "training", "fps": 10, "view": "gripper"}}, **PAIRS)
        .sample(0, rng)["id"]
        .endswith("/gripper+10")
    )


def test_labelled_calvin_pairs_hold_the_robots_readings(tmp_path: Path) -> None:
    root = write_calvin(tmp_path / "calvin", recordings=4) / "training"
    samples, rng = CalvinTransitions(root, fps=10, labelled=True, **PAIRS), np.random.default_rng(0)
    note = samples.segments[0]
    for frame in range(note.start, note.end + 1):
        with np.load(root / f"episode_{frame:07d}.npz") as archive:
            np.savez(root / f"episode_{frame:07d}.npz", **{**archive, "robot_obs": np.full(15, float(frame))})
    pair = samples.sample(0, rng)
    start = int(pair["id"].split("/")[-2])
    assert (
        pair["state"].shape == (2, 15)
        and pair["state"][:, 0].tolist() == [start, start + 10]
        and pair["view"] == "static"
    )
    assert (
        pair["phase"] == (start - note.start) / (note.end - note.start)
        and pair["episode"] != samples.sample(1, rng)["episode"]
    )
    assert "state" not in CalvinTransitions(root, fps=10, **PAIRS).sample(0, rng)


def test_bad_calvin_is_one_line(tmp_path: Path) -> None:
    root = write_calvin(tmp_path / "calvin", recordings=4) / "training"
    rng = np.random.default_rng(0)
    samples = CalvinTransitions(root, fps=32, **PAIRS)  # a pair spans the whole annotation
    frame = root / f"episode_{samples.segments[1].end:07d}.npz"
    frame.write_bytes(frame.read_bytes()[:100])
    with pytest.raises(UnreadableSample, match=r"calvin/training/\d+/static\+32: .*npz: truncated or damaged"):
        samples.sample(1, rng)
    frame.unlink()
    with pytest.raises(UnreadableSample, match="is missing"):
        samples.sample(1, rng)
    with pytest.raises(UnreadableSample, match="33 frames are too few for pairs 90 apart"):
        CalvinTransitions(root, fps=90, **PAIRS).sample(1, rng)
    samples.segments[0] = replace(samples.segments[0], text=" ")
    with pytest.raises(FilteredSample, match="without a sentence"):
        samples.sample(0, rng)
    with pytest.raises(UserError, match="unknown view 'wrist'; use static, gripper, or null"):
        CalvinTransitions(root, view="wrist", **PAIRS)
    with pytest.raises(CalvinFormatError, match="ep_start_end_ids.npy is missing"):
        CalvinTransitions(tmp_path, **PAIRS)


def test_frames_of_two_sizes_make_a_pair() -> None:
    grey = [np.full((6, 8, 3), 51, np.uint8), np.full((40, 30, 3), 102, np.uint8)]
    images = Transitions(image_size=16).preprocess(grey, np.random.default_rng(0))
    assert (
        images.shape == (2, 3, 16, 16)
        and torch.allclose(images[0], torch.tensor(0.2))
        and torch.allclose(images[1], torch.tensor(0.4))
    )


def test_open_x_finds_sets_by_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}

    class Fake(Transitions):
        def __init__(self, folder: Path, split: str, **options: object) -> None:
            made[folder.parent.name] = {"split": split, **options}

        def __len__(self) -> int:
            return 5

    monkeypatch.setitem(dataset.FORMATS, "rlds", Fake)
    for name in ("fractal20220817_data", "dobbe", "austin_buds_dataset_converted_externally_to_rlds"):
        folder = tmp_path / "DOWNLOAD_DIR" / name / "0.1.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
    human = video_set(tmp_path / "ego4d", 3)
    mix = build_open_x_mixture(tmp_path, human_root=human, names=["fractal", "dobbe", "austin_buds"], image_size=32)
    assert mix.names == ["fractal", "dobbe", "austin_buds", "ego4d"]
    assert mix.shares == pytest.approx(np.array([16.3, 2.0, 0.4, 3.5]) / 22.2)
    assert (
        made["dobbe"]["fps"] == 3.75
        and 3 <= made["dobbe"]["window"] <= 5
        and made["dobbe"]["image"] == "observation/wrist_image"
    )
    assert made["fractal20220817_data"]["text"] == "observation/natural_language_instruction"
    assert build_open_x_mixture(
        tmp_path, human_root="nowhere", names=["dobbe"], human_fraction=0, length=9, image_size=32
    ).names == ["dobbe"]
    assert OXE["bc_z"].version == OXE["bridge"].version == "0.1.0"
    (tmp_path / "CONVERSION_DIR" / "bc_z" / "1.0.1").mkdir(parents=True)
    (tmp_path / "CONVERSION_DIR" / "bc_z" / "1.0.1" / "dataset_info.json").write_text("{}")
    with pytest.raises(MissingFileError, match="bc_z: version 0.1.0 is wanted, there is 1.0.1"):
        build_open_x_mixture(tmp_path, human_root=human, names=["bc_z"], image_size=32)
    with pytest.raises(MissingFileError, match="kuka"):
        build_open_x_mixture(tmp_path, human_root=human, names=["kuka"], image_size=32)
    with pytest.raises(UserError, match="unknown Open X-Embodiment sets \\['dob'\\]"):
        build_open_x_mixture(tmp_path, human_root=human, names=["dob"], image_size=32)


def bridge(shared_data: Path, **options: object) -> RldsTransitions:
    return RldsTransitions(
        shared_data / "rlds_samples/bridge_dataset/1.0.0",
        **{"fps": 5, "image": "observation/image_0", **PAIRS, **options},
    )


def test_real_rlds_pairs(shared_data: Path) -> None:
    train, val = bridge(shared_data), bridge(shared_data, split="val")
    assert (len(train), len(val)) == (23, 2) and not set(train.kept) & set(val.kept)
    rng = np.random.default_rng(0)
    starts = set()
    for i in range(23):
        sample = train.sample(i, rng)
        start, gap = map(int, sample["id"].split("@")[1].split("+"))
        starts.add(start)
        assert gap == 5 and start + gap < 10 and sample["text"] and (sample["frames"][0] != sample["frames"][1]).any()
    assert starts == set(range(5))


def test_corrupt_record_is_reported_by_id(shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "1.0.0"
    folder.mkdir()
    # The files are read-only, so only their contents are copied.
    for file in (shared_data / "rlds_samples/bridge_dataset/1.0.0").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shard = next(folder.glob("*.tfrecord-*"))
    data = bytearray(shard.read_bytes())
    data[int(rlds.TFRecordFile(shard).spans[1][0]) + 5000] ^= 0xFF  # record 0 is held out
    shard.write_bytes(bytes(data))
    with pytest.raises(UnreadableSample, match=r"bridge_dataset/1: .*record 1 is corrupt \(crc differs\)"):
        RldsTransitions(folder, fps=5, image="observation/image_0", **PAIRS).sample(0, np.random.default_rng(0))
    with pytest.raises(UnreadableSample, match="no feature 'observation/image'"):
        RldsTransitions(folder, fps=5, **PAIRS).sample(1, np.random.default_rng(0))
    with pytest.raises(UnreadableSample, match="10 frames are too few for pairs 30 apart"):
        RldsTransitions(folder, fps=30, image="observation/image_0", **PAIRS).sample(1, np.random.default_rng(0))


def test_an_episode_without_a_sentence_is_reported(tmp_path: Path) -> None:
    folder = write_rlds(tmp_path / "toy" / "1.0.0")
    samples = RldsTransitions(folder, fps=1, **TOY, **PAIRS)
    assert samples.sample(0, np.random.default_rng(0))["text"] == "päck"
    for path in folder.glob("*.tfrecord-*"):
        file = rlds.TFRecordFile(path)
        path.write_bytes(b"".join(record(silent(file[i])) for i in range(len(file))))
    with pytest.raises(FilteredSample, match="toy/1: no instruction under instruction"):
        RldsTransitions(folder, fps=1, **TOY, **PAIRS).sample(0, np.random.default_rng(0))


def test_a_sentence_is_read_as_the_table_says_and_a_contradiction_is_one_line(tmp_path: Path) -> None:
    assert {name for name, row in OXE.items() if row.encoding == "code_points"} == {"language_table"} and OXE[
        "language_table"
    ].text.endswith("/instruction")
    folder, rng = write_rlds(tmp_path / "toy" / "1.0.0"), np.random.default_rng(0)
    assert RldsTransitions(folder, fps=1, text="observation/wide", **PAIRS).sample(0, rng)["text"] == "ab\0c"
    with pytest.raises(
        UnreadableSample,
        match=r"toy/train/1: instruction is not encoded as text, it holds int32 of shape \(8,\); name its encoding",
    ) as caught:
        RldsTransitions(folder, fps=1, **{**TOY, "encoding": "text"}, **PAIRS).sample(0, rng)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableSample, match="observation/wide is not encoded as code_points, it holds bytes"):
        RldsTransitions(folder, fps=1, **{**TOY, "text": "observation/wide"}, **PAIRS).sample(0, rng)
    with pytest.raises(
        UnreadableSample, match=r"action is not encoded as code_points, it holds float32 of shape \(2,\)"
    ):
        RldsTransitions(folder, fps=1, **{**TOY, "text": "action"}, **PAIRS).sample(0, rng)
    with pytest.raises(UserError, match="unknown encoding 'ascii' of sentences; use text, code_points"):
        RldsTransitions(folder, fps=1, **{**TOY, "encoding": "ascii"}, **PAIRS)


def silent(payload: bytes) -> bytes:
    """The same episode with a sentence of padding alone."""
    example = tf_example_pb2.Example.FromString(payload)
    codes = example.features.feature["steps/instruction"].int64_list.value
    codes[:] = [0] * len(codes)
    return example.SerializeToString()


def test_empty_shards_are_passed_over_and_an_empty_set_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = {"fps": 1, **TOY}
    samples = RldsTransitions(write_rlds(tmp_path / "some" / "1.0.0", shards=(0, 2, 0, 2)), **toy, **PAIRS)
    assert len(samples) == 3 and [
        samples.episode_pairs(i, 1)["frames"][0, 0].mean().mul(255).round().item() for i in range(3)
    ] == [10, 20, 30]
    sets = {
        "some": {"rlds": tmp_path / "some/1.0.0", **toy},
        "none": {"rlds": write_rlds(tmp_path / "none" / "1.0.0", shards=(0,)), **toy},
    }
    with pytest.raises(UserError, match="set 'none': rlds=.*none/1.0.0 gives no train episodes"):
        build_mixture(sets, **PAIRS)
    assert build_mixture(sets, split="val", **PAIRS).names == ["some"] and "set 'none': rlds=" in caplog.text


@pytest.mark.parametrize("name, fps, gap", [("bridge", 5, 5), ("rt1", 3, 3), ("sthv2", None, 12)])
def test_real_video_pairs(shared_data: Path, name: str, fps: float | None, gap: int) -> None:
    folder = shared_data / "video_samples" / name
    samples = VideoTransitions(folder, "val", fps=fps, **PAIRS)
    for i in range(len(samples)):
        sample = samples.sample(i, np.random.default_rng(i))
        assert sample["id"].endswith(f"+{gap}") and (sample["frames"][0] - sample["frames"][1]).abs().mean() > 0.001
