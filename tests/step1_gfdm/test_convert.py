"""convert: real samples in published layouts, unreadable episodes, and runs that were stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from common import video
from common.calvin_format import CalvinFormatError
from common.program import CONFIGS
from common.video_set import annotations, read_annotation
from step1_gfdm import convert as program
from step1_gfdm.convert import convert
from step1_gfdm.dataset import VideoClips
from step1_gfdm.sources import CalvinSource, Ego4dSource, EpisodeEntry, FolderSource
from tests.step3_defi.parts import write_calvin

ROOT = Path(CONFIGS).parent


def film(path: Path, count: int = 12, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    video.write_mp4(
        path, np.repeat(rng.integers(0, 255, (count, 1, 1, 3), np.uint8), size[0], 1).repeat(size[1], 2), 10
    )
    return path


def captioned(root: Path, rows: list[str], head: str = "video,text") -> FolderSource:
    root.mkdir(exist_ok=True)
    (root / "captions.csv").write_text("\n".join([head, *rows]) + "\n")
    return FolderSource(root)


def source(name: str, root: Path, **options: object) -> object:
    with initialize_config_dir(CONFIGS, version_base=None):
        cfg = compose("step1_convert", [f"source={name}", f"root={root}", "out=x"])
    return instantiate(OmegaConf.to_container(cfg.source, resolve=True), root=cfg.root, **options)


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_real_bridge_rlds(shared_data: Path, tmp_path: Path) -> None:
    counts = convert(source("bridge", shared_data / "rlds_samples"), tmp_path, image_size=64, limit=6)
    assert counts["converted"] + counts["no caption"] == 6 and counts["converted"] >= 3
    file = annotations(tmp_path / "annotation", "train")[0]
    record = read_annotation(file)
    assert (
        record["video_length"] == 10
        and record["fps"] == 5
        and len(record["texts"][0]) > 5
        and np.shape(record["state"]) == (10, 7)
    )
    clips = VideoClips(tmp_path, "train", num_frames=4, clip={"span": "episode"}, image_size=64)
    frames = clips.sample(0, np.random.default_rng(0))["frames"]
    assert frames.shape == (4, 3, 64, 64) and frames.std() > 0.05


def test_real_something_something(shared_data: Path, tmp_path: Path) -> None:
    published, out = tmp_path / "ssv2", tmp_path / "out"
    (published / "labels").mkdir(parents=True)
    (published / "20bn-something-something-v2").mkdir()
    samples = shared_data / "video_samples/sthv2"
    labels = []
    for file in sorted((samples / "annotation/val").glob("*.json")):
        (published / "20bn-something-something-v2" / f"{file.stem}.webm").symlink_to(
            samples / f"videos/{file.stem}.webm"
        )
        labels.append(
            {"id": file.stem, "label": json.loads(file.read_text())["texts"][0], "template": "", "placeholders": []}
        )
    (published / "labels/train.json").write_text(json.dumps(labels[:2]))
    (published / "labels/validation.json").write_text(json.dumps([*labels[2:], {"id": "1", "label": ""}]))
    counts = convert(source("ssv2", published), out, image_size=64)
    assert counts["converted"] == 4 and counts["no caption"] == 1
    for split, expected in (("train", labels[:2]), ("val", labels[2:])):
        for label in expected:
            record = read_annotation(out / f"annotation/{split}/{label['id']}.json")
            assert record["texts"] == [label["label"]]
            original = json.loads((samples / f"annotation/val/{label['id']}.json").read_text())["video_length"]
            assert record["video_length"] == original == video.probe(out / record["videos"][0]["video_path"])[0]


def test_a_folder_of_videos_and_parts_of_them(shared_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "hands.mp4").write_bytes((shared_data / "human_video/hands_cup.mp4").read_bytes())
    length, fps, _ = video.probe(root / "hands.mp4")
    (root / "captions.json").write_text(
        json.dumps(
            [
                {"video": "hands.mp4", "text": "turn a cup"},
                {"video": "hands.mp4", "text": "hold a cup", "start": 0.5, "end": 1.0, "split": "val"},
                {"file": "hands.mp4", "caption": "", "id": "silent"},
            ]
        )
    )
    counts = convert(FolderSource(root), tmp_path / "out", image_size=64)
    assert counts["converted"] == 2 and counts["no caption"] == 1
    whole, part = (
        read_annotation(next((tmp_path / "out/annotation" / split).glob("*.json"))) for split in ("train", "val")
    )
    assert whole["video_length"] == length and part["video_length"] == round(fps * 1.0) - round(fps * 0.5)
    first = video.read_frames(tmp_path / "out" / part["videos"][0]["video_path"], [0])
    expected = video.resize(video.read_frames(root / "hands.mp4", [round(fps * 0.5)]), 64)
    assert abs(first[0].transpose(2, 0, 1) / 255 - expected[0].numpy()).mean() < 0.04


def test_calvin_leaves_scene_d_out(tmp_path: Path) -> None:
    root = write_calvin(tmp_path / "in")  # recordings from frames 100, 145, 190, 235
    found = CalvinSource(root).episodes()
    assert len(found) == 4 and not any(entry.reason for entry in found)
    np.save(
        root / "training/scene_info.npy",
        np.array({"calvin_scene_A": [100, 189], "calvin_scene_D": [190, 300]}, dtype=object),
        allow_pickle=True,
    )
    assert [entry.reason for entry in CalvinSource(root).episodes()] == [None, None, "scene D", "scene D"]
    counts = convert(CalvinSource(root), tmp_path / "out", image_size=16)
    assert counts["converted"] == 2 and counts["scene D"] == 2 and counts["frames"] == 66
    record = read_annotation(tmp_path / "out/annotation/train/train_000000.json")
    assert (
        len(record["videos"]) == 2
        and record["video_length"] == 33
        and record["fps"] == 30
        and record["state"] == [[0.0] * 15] * 33
    )
    assert record["scene"] == "calvin_scene_A"
    np.save(root / "training/scene_info.npy", np.array({"calvin_scene_A": 100}, dtype=object), allow_pickle=True)
    with pytest.raises(CalvinFormatError, match="scene_info.npy: expected a dictionary of scenes"):
        CalvinSource(root).episodes()
    (root / "training/scene_info.npy").unlink()
    convert(CalvinSource(root), tmp_path / "without_scene", image_size=16, limit=1)
    assert "scene" not in read_annotation(tmp_path / "without_scene/annotation/train/train_000000.json")
    os.symlink(root / "training", root / "validation")
    asked = CalvinSource(root, scene_d=True).episodes()
    assert Counter(entry.split for entry in asked) == {"train": 4, "val": 4} and not any(
        entry.reason for entry in asked
    )


def test_ego4d_cuts_around_the_narrated_action(tmp_path: Path) -> None:
    root = tmp_path / "in"
    film(root / "clips/abc.mp4", 60)
    action = {
        "narration_text": "#C C picks a cup #unsure",
        "is_rejected": False,
        "is_valid_action": True,
        "clip_start_frame": 0,
        "clip_end_frame": 50,
        "clip_critical_frames": {"pre_frame": 10, "pnr_frame": 20, "post_frame": 34},
    }
    actions = [
        action,
        {**action, "clip_critical_frames": None},
        {**action, "is_rejected": True},
        {**action, "narration_text": "#O A man walks"},
        {**action, "clip_critical_frames": {"pre_frame": 50, "post_frame": 90}},
    ]
    (root / "annotations").mkdir()
    intervals = [{"clip_uid": "abc", "narrated_actions": actions}, {"clip_uid": None, "narrated_actions": []}]
    content = {"videos": [{"video_uid": "v", "annotated_intervals": intervals}]}
    (root / "annotations/fho_main.json").write_text(json.dumps(content))
    counts = convert(Ego4dSource(root), tmp_path / "out", image_size=16, max_unreadable_fraction=0.5)
    assert counts == {
        "converted": 2,
        "frames": 25 + 51,
        "rejected by Ego4D": 1,
        "not the camera wearer": 1,
        "unreadable": 1,
    }
    assert sorted(path.stem for path in (tmp_path / "out/annotation/train").iterdir()) == ["abc_000", "abc_001"], (
        "an id an action, not a clip"
    )
    record = read_annotation(tmp_path / "out/annotation/train/abc_000.json")
    assert record["texts"] == ["picks a cup"] and record["video_length"] == 25
    shown = video.read_frames(tmp_path / "out" / record["videos"][0]["video_path"], [0, 24])
    truth = video.read_frames(root / "clips/abc.mp4", [10, 34])
    assert abs(shown.mean((1, 2)) - truth.mean((1, 2))).max() < 8


def test_ego4d_cuts_whole_videos_by_their_own_frames(tmp_path: Path) -> None:
    root = tmp_path / "in"
    film(root / "full_scale/v.mp4", 80)
    film(root / "clips/both.mp4", 30, seed=1)
    (root / "annotations").mkdir()
    action = {
        "narration_text": "#C C picks a cup",
        "start_frame": 40,
        "end_frame": 75,
        "critical_frames": {"pre_frame": 45, "post_frame": None},
        "clip_start_frame": 2,
        "clip_end_frame": 25,
        "clip_critical_frames": {"pre_frame": None, "post_frame": 20},
    }
    intervals = [{"clip_uid": name, "narrated_actions": [action]} for name in ("gone", None, "both")]
    content = {
        "videos": [
            {"video_uid": "v", "annotated_intervals": intervals},
            {"video_uid": "w", "annotated_intervals": intervals[:1]},
        ]
    }
    (root / "annotations/fho_main.json").write_text(json.dumps(content))
    counts = convert(Ego4dSource(root), tmp_path / "out", image_size=16, max_unreadable_fraction=0.5)
    assert counts == {"converted": 3, "frames": 2 * 31 + 19, "unreadable": 1}, "the fourth has neither file"
    for name, path, first in (
        ("gone_000", "full_scale/v", 45),
        ("v_000", "full_scale/v", 45),
        ("both_000", "clips/both", 2),
    ):
        record = read_annotation(tmp_path / f"out/annotation/train/{name}.json")
        shown = video.read_frames(tmp_path / "out" / record["videos"][0]["video_path"], [0, 18])
        assert (
            abs(shown.mean((1, 2)) - video.read_frames(root / f"{path}.mp4", [first, first + 18]).mean((1, 2))).max()
            < 8
        )


def test_bad_episodes_are_counted_and_named_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "in"
    whole = film(root / "whole.mp4")
    (root / "empty.mp4").touch()
    (root / "cut.mp4").write_bytes(whole.read_bytes()[:300])
    (root / "text.mp4").write_text("not a video")
    rows = [
        "whole.mp4,go",
        "empty.mp4,go",
        "cut.mp4,go",
        "text.mp4,go",
        "gone.mp4,go",
        "whole.mp4,again",
        "../secret.mp4,go",
        "mute.mp4,",
    ]
    counts = convert(captioned(root, rows), tmp_path / "out", image_size=16, max_unreadable_fraction=1.0)
    assert counts == {
        "converted": 1,
        "frames": 12,
        "unreadable": 4,
        "id taken by another episode": 1,
        "path leaves the folder": 1,
        "no caption": 1,
    }
    said = capsys.readouterr().out
    assert (
        "empty.mp4: empty file" in said
        and "gone.mp4: no such video" in said
        and "whole: id taken" in said
        and "secret.mp4: path leaves" in said
    )
    assert list(tree(tmp_path / "out")) == ["annotation/train/whole.json", "convert.json", "videos/train/whole/0.mp4"]


def test_a_run_stops_where_too_much_is_bad(tmp_path: Path) -> None:
    root = tmp_path / "in"
    film(root / "good.mp4")
    rows = ["good.mp4,go", *(f"gone{number}.mp4,go" for number in range(30))]
    with pytest.raises(ValueError, match=r"19 of 20 episodes are unreadable, more than max_unreadable_fraction=0.1"):
        convert(captioned(root, rows), tmp_path / "out", image_size=16)
    assert (tmp_path / "out/annotation/train/good.json").is_file()


def test_ranks_and_workers_share_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    root = tmp_path / "in"
    rows = [f"{film(root / f'{number}.mp4', seed=number).name},go {number}" for number in range(5)]
    source = captioned(root, rows)
    convert(source, tmp_path / "one", image_size=16)
    for rank in range(2):
        convert(source, tmp_path / "ranks", image_size=16, rank=rank, world=2)
    assert convert(source, tmp_path / "workers", image_size=16, workers=2)["converted"] == 5
    assert tree(tmp_path / "one") == tree(tmp_path / "ranks") == tree(tmp_path / "workers")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    assert convert(source, tmp_path / "one", image_size=16) == {"already there": 5, "frames": 60}
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    with pytest.raises(ValueError, match="choose another folder with out="):
        convert(source, tmp_path / "one", image_size=32)


def test_a_full_disk_ends_with_one_line_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "in"
    source = captioned(root, [f"{film(root / f'{number}.mp4').name},go" for number in range(2)])
    real, calls = video.write_mp4, []

    def write_to_full_disk(path: Path, *args: object, **options: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *args, **options)

    monkeypatch.setattr(program.video, "write_mp4", write_to_full_disk)
    with pytest.raises(ValueError, match="the disk is full"):
        convert(source, tmp_path / "out", image_size=16)
    assert list((tmp_path / "out/annotation").rglob("*.json")) == [tmp_path / "out/annotation/train/0.json"]
    assert convert(source, tmp_path / "out", image_size=16) == {"already there": 1, "converted": 1, "frames": 24}


def test_killed_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    root = tmp_path / "in"
    source = captioned(root, [f"{film(root / f'{number}.mp4', 40, seed=number).name},go" for number in range(40)])
    convert(source, tmp_path / "whole", image_size=64)
    command = [
        sys.executable,
        "-m",
        "step1_gfdm.convert",
        "source=folder",
        f"root={root}",
        f"out={tmp_path / 'broken'}",
        "image_size=64",
    ]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = tmp_path / "broken/annotation/train"
    limit = time.monotonic() + 300
    while not done.is_dir() or len(list(done.glob("*.json"))) < 3:
        assert started.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert len(list(done.glob("[!.]*.json"))) < 40
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "already there" in ended.stdout and str(tmp_path / "broken") in ended.stdout
    visible = {
        name: content for name, content in tree(tmp_path / "broken").items() if not Path(name).name.startswith(".")
    }
    assert visible == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "name, words",
    [
        ("ssv2", "found no labels/train.json"),
        ("folder", "no captions; name a csv or json"),
        ("calvin", "ep_start_end_ids.npy is missing"),
        ("ego4d", "fho_main.json is missing"),
        ("fractal", "no RLDS folder"),
    ],
)
def test_what_a_source_misses_is_named(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(Exception, match=words):  # Hydra wraps what a constructor raises
        convert(source(name, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_program_ends_with_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "step1_gfdm.convert",
        "source=fractal",
        f"root={tmp_path}",
        f"out={tmp_path / 'out'}",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (
        ended.returncode == 1 and ended.stderr.startswith("error: no RLDS folder") and "Traceback" not in ended.stderr
    )


def test_ids_become_safe_file_names() -> None:
    listed = program._mark_duplicates([EpisodeEntry("a/b:c"), EpisodeEntry("a b c"), EpisodeEntry("..")])
    assert [program._file_name(entry.id) for entry in listed] == ["a_b_c", "a_b_c", "_"] and listed[
        1
    ].reason == "id taken by another episode"
