"""A person's hand as a second source of video: shown instead of the robot, moved like it, recorded without actions."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from envs.playtable import PlayTableEnv, human
from envs.playtable.mjcf import compile_model
from envs.playtable.scene import get_scene
from envs.recording.demonstrate import demonstrate_chain
from envs.recording.recorder import record
from envs.tasks import INSTRUCTIONS
from step1_gfdm.dataset import VideoClips
from step2_gidm.data.transitions import VideoTransitions

HAND = {"_target_": "envs.playtable.PlayTableEnv", "embodiment": "hand"}


def played(embodiment: str) -> tuple[PlayTableEnv, np.ndarray]:
    """An environment in which the expert opened the drawer, and robot_obs and scene_obs of all steps (T, 39)."""
    env = PlayTableEnv("A", embodiment=embodiment)
    expert, start, rows = env.expert(seed=1), env.get_info(), []
    expert.reset("open_drawer")
    for _ in range(120):
        state, info = env.step(expert.act(), render=False)
        rows.append(np.concatenate([state["robot_obs"], state["scene_obs"]]))
        if env.check_success("open_drawer", start, info):
            return env, np.array(rows)
    raise AssertionError("the drawer stayed shut")


def test_the_hand_moves_as_the_robot_does_and_looks_unlike_it() -> None:
    robot, moves = played("robot")
    hand, same = played("hand")
    np.testing.assert_allclose(moves, same, rtol=0, atol=1e-6)  # the number of geoms changes the order of summation
    pictures = [env.get_obs()["rgb_obs"] for env in (robot, hand)]
    for camera, share in (("rgb_static", 0.02), ("rgb_gripper", 0.1)):
        one, two = (picture[camera].astype(int) for picture in pictures)
        assert (np.abs(one - two).max(-1) > 30).mean() > share, camera


@pytest.mark.parametrize("shown", [False, True])
def test_only_one_of_the_two_is_seen(shown: bool) -> None:
    model = compile_model(get_scene("B"), human_arm=shown)
    first, last = model.body("link0").id, model.body("finger_right").id
    looks = {
        model.mat(int(model.geom_matid[geom])).name
        for geom in range(model.ngeom)
        if first <= model.geom_bodyid[geom] <= last and model.geom_group[geom] < 3
    }
    assert looks == set(human.MATERIAL_RGB) if shown else looks and not looks & set(human.MATERIAL_RGB)
    assert not shown or sum(model.geom_contype == 2) == sum(compile_model(get_scene("B")).geom_contype == 2)


def test_the_expert_succeeds_as_a_hand_in_motions_of_its_own() -> None:
    tasks = ["open_drawer", "turn_on_led", "lift_red_block_table", "lift_blue_block_table", "move_slider_left"]
    chains = {
        body: [
            demonstrate_chain(
                PlayTableEnv("A", embodiment=body, static_size=8, gripper_size=8), tasks, 2, seed=0, number=number
            )
            for number in range(4)
        ]
        for body in ("robot", "hand")
    }
    assert (
        sum(failed for _, failed in chains["hand"]) <= 1 and sum(len(segments) for segments, _ in chains["hand"]) >= 4
    )
    robot, hand = (
        [segment.rel_actions for segments, _ in chains[body] for segment in segments] for body in ("robot", "hand")
    )
    assert not any(np.array_equal(one, two) for one in robot for two in hand)


def test_an_unknown_embodiment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embodiment='paw': choose one of robot, hand"):
        PlayTableEnv("A", embodiment="paw")


def test_a_recording_of_a_hand_is_a_video_set_without_motions(tmp_path: Path) -> None:
    out = tmp_path / "hand"
    request = {
        "scenes": ["A", "B"],
        "tasks": ["open_drawer", "close_drawer", "turn_on_led"],
        "episodes": 8,
        "workers": 1,
        "env": HAND,
        "validation_fraction": 0.2,
    }
    counts = record(**request, out=out, videos=True)
    root = out / "videos_set"
    assert sorted(path.name for path in out.iterdir()) == ["videos_set"], "no frames, no actions"
    notes = {
        split: [json.loads(path.read_text()) for path in sorted((root / "annotation" / split).glob("*.json"))]
        for split in ("train", "val")
    }
    assert len(notes["train"] + notes["val"]) == 8 == counts["episodes"] and notes["val"]
    assert sum(note["video_length"] for notes in notes.values() for note in notes) == counts["frames"]
    assert {note["scene"] for note in notes["train"]} == {"calvin_scene_A", "calvin_scene_B"}
    for note in notes["train"] + notes["val"]:
        assert note["texts"][0] in INSTRUCTIONS.values() and "state" not in note and "action" not in json.dumps(note)
        assert len(note["videos"]) == len(note["latent_videos"]) == 1, "nobody wears a camera at the wrist"
        with av.open(str(root / note["videos"][0]["video_path"])) as film:
            assert film.streams.video[0].average_rate == note["fps"] == 30
            assert sum(1 for _ in film.decode(video=0)) == note["video_length"]
    clips = VideoClips(root, "train", num_frames=4, clip={"stride": 10, "step_between_clips": 2}, image_size=32)
    assert clips.sample(0, np.random.default_rng(0))["frames"].shape == (4, 3, 32, 32) and clips.states(0) is None
    pairs = VideoTransitions(root, "train", image_size=32, view=None)
    assert pairs.sample(0, np.random.default_rng(0))["frames"].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="already holds"):
        record(**request, out=out, videos=True)
    with pytest.raises(ValueError, match="would record nothing"):
        record(**request, out=tmp_path / "x", videos=False)
