"""The video-set format: annotations are read as written, one rule for held-out episodes, no path leaves its set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import video_set
from common.errors import UnreadableSample, UserError


def write(root: Path, name: str = "a", split: str = "train", **options: Any) -> Path:
    given = {"texts": ["open the drawer"], "num_cameras": 2, "length": 3}
    return video_set.write_annotation(root, split, name, **(given | options))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    states = np.arange(6, dtype=np.float32).reshape(3, 2) / 3
    file = write(tmp_path, fps=30.0, scene="calvin_scene_A", states=states, task="t", episode_id="x/1")
    record = video_set.read_annotation(file)
    assert file == tmp_path / "annotation/train/a.json"
    assert (record["texts"], record["fps"], record["scene"], record["task"]) == (
        ["open the drawer"],
        30.0,
        "calvin_scene_A",
        "t",
    )
    assert record["episode_id"] == "x/1" and record["state"] == states.astype(float).round(5).tolist()
    assert video_set.num_cameras(file, record) == 2 and video_set.known_length(record) == 3
    assert video_set.video_path(tmp_path, file, record, 1) == tmp_path / "videos/train/a/1.mp4"
    assert video_set.latent_target(tmp_path, file, record, 1) == tmp_path / "latent_videos/train/a/1.pt"
    with pytest.raises(UnreadableSample, match="no video for camera 2, it has 2 cameras"):
        video_set.video_path(tmp_path, file, record, 2)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    record = video_set.read_annotation(write(tmp_path))
    assert not {"fps", "scene", "state", "task"} & record.keys() and record["episode_id"] == "a"


@pytest.mark.parametrize("count, held_out", [(0, []), (1, []), (2, [0]), (20, [0]), (41, [0, 20, 40])])
def test_every_twentieth_episode_is_held_out_from_the_first_on(count: int, held_out: list[int]) -> None:
    train, val = (video_set.split_indices(count, split).tolist() for split in ("train", "val"))
    assert val == held_out and sorted(train + val) == list(range(count))
    with pytest.raises(UserError, match="split is 'test'; use train or val"):
        video_set.split_indices(count, "test")


def test_a_val_folder_decides_and_only_split_names_the_folder_to_divide(tmp_path: Path) -> None:
    for number in range(21):
        write(tmp_path, f"{number:02d}")
    folder = tmp_path / "annotation"

    def names(split: str, **options: str) -> list[str]:
        return [file.stem for file in video_set.annotations(folder, split, **options)]

    assert names("val") == ["00", "20"] and len(names("train")) == 19
    write(tmp_path, "v0", "val"), write(tmp_path, "v1", "val")
    assert names("val") == ["v0", "v1"] and len(names("train")) == 21
    assert (names("train", only_split="val"), names("val", only_split="val")) == (["v1"], ["v0"])


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "is not readable JSON"),
        ("[]", "has no sentence"),
        ("{}", "has no sentence"),
        ('{"texts": []}', "has no sentence"),
        ('{"texts": [3]}', "has no sentence"),
    ],
)
def test_a_bad_annotation_is_one_line(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(UnreadableSample, match=f"a.json: {says}") as caught:
        video_set.read_annotation(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableSample, match="a.json: names no videos"):
        video_set.num_cameras(file, {})


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/0.mp4", "videos/../../0.mp4", "", "."])
@pytest.mark.parametrize(
    "field, key, read",
    [
        ("videos", "video_path", video_set.video_path),
        ("latent_videos", "latent_video_path", video_set.latent_path),
        ("latent_videos", "latent_video_path", video_set.latent_target),
    ],
)
def test_no_path_leaves_its_set(field: str, key: str, read: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableSample, match=rf"a.json: {field}\[0\] points outside its set: "):
        read(tmp_path, tmp_path / "a.json", {field: [{key: name}]}, 0)
    with pytest.raises(UnreadableSample, match=rf"{field}\[0\] has no {key}"):
        read(tmp_path, tmp_path / "a.json", {field: [{}]}, 0)


def test_latents_are_found_under_either_name_and_named_once(tmp_path: Path) -> None:
    file = write(tmp_path)
    assert not video_set.has_latents(tmp_path)
    record = video_set.read_annotation(file)
    with pytest.raises(UnreadableSample, match="its latents latent_videos/train/a/0.pt are missing; make them with"):
        video_set.latent_path(tmp_path, file, record, 0)
    other = tmp_path / "latent_videos_svd/train/a/0.pt"
    other.parent.mkdir(parents=True)
    other.touch()
    assert video_set.latent_path(tmp_path, file, record, 0) == other and video_set.has_latents(tmp_path)
    before = file.stat().st_mtime_ns
    video_set.write_latent_paths(tmp_path, file, record, 3)
    assert file.stat().st_mtime_ns == before, "it names them already"
    bare = {"texts": ["a"], "videos": [{"video_path": "x.mp4"}], "own key": 1}
    video_set.write_latent_paths(tmp_path, tmp_path / "annotation/train/b.json", bare, 7)
    written = json.loads((tmp_path / "annotation/train/b.json").read_text())
    assert written == bare | {
        "video_length": 7,
        "latent_videos": [{"latent_video_path": "latent_videos/train/b/0.pt"}],
    }


def test_an_episode_is_finished_with_its_annotation_and_all_its_videos(tmp_path: Path) -> None:
    assert video_set.finished_length(tmp_path, "train", "a") == 0
    write(tmp_path)
    folder = tmp_path / "videos/train/a"
    folder.mkdir(parents=True)
    (folder / "0.mp4").touch()
    assert video_set.finished_length(tmp_path, "train", "a") == 0
    (folder / "1.mp4").touch()
    assert video_set.finished_length(tmp_path, "train", "a") == 3
