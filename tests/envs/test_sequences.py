"""Sequences equal CALVIN's published ones, and initial states have CALVIN's numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from envs.playtable.scene import SCENES
from envs.sequences import (
    INITIAL_STATES,
    TASK_CATEGORIES,
    _fnv1_32,
    get_env_state_for_initial_condition,
    get_sequences,
    next_state,
)
from envs.tasks import ELEVEN, TASKS

OFFICIAL_SHA256 = "90191d9ac76baecb4f292ab766bbbf3ae65dbf43a83bbe5c376d99db10fd6446"


def digest(sequences: list) -> str:
    text = json.dumps([list(pair) for pair in sequences], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def official() -> list:
    return get_sequences(1000)


def test_the_thousand_are_pinned(official: list) -> None:
    assert digest(official) == OFFICIAL_SHA256


def test_the_thousand_are_the_published_ones(official: list, shared_data: Path) -> None:
    published = json.loads((shared_data / "calvin_meta" / "eval_sequences_1000.json").read_text())
    assert [list(pair) for pair in official] == published


def test_a_short_run_is_the_beginning_of_a_long_one(official: list) -> None:
    assert get_sequences(7) == official[:7]


def test_every_sequence_is_possible_and_varied(official: list) -> None:
    for state, tasks in official:
        assert len({TASK_CATEGORIES[task] for task in tasks}) == 5
        for task in tasks:
            state = next_state(state, task)
            assert state is not None


def test_there_are_192_initial_states() -> None:
    assert len(INITIAL_STATES) == 192 == len({str(state) for state in INITIAL_STATES})


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_small_vocabulary_uses_its_own_tasks_and_all_its_categories(length: int) -> None:
    categories = len({TASK_CATEGORIES[task] for task in ELEVEN})
    for state, tasks in get_sequences(30, tasks=list(ELEVEN), length=length):
        assert len(tasks) == length == len(set(tasks)) and set(tasks) <= set(ELEVEN)
        assert len({TASK_CATEGORIES[task] for task in tasks}) == min(length, categories)
        for task in tasks:
            state = next_state(state, task)
            assert state is not None


def test_five_of_the_eleven_end_with_a_lift() -> None:
    assert all(tasks[-1].startswith("lift") for _, tasks in get_sequences(40, tasks=list(ELEVEN)))


def test_single_lifts_start_in_many_states_with_the_block_on_the_table() -> None:
    sequences = get_sequences(100, tasks=["lift_red_block_table", "lift_blue_block_table"], length=1)
    assert all(state[f"{tasks[0].split('_')[1]}_block"] == "table" for state, tasks in sequences)
    assert len({str(state) for state, _ in sequences}) > 50


def test_seeds_differ_and_repeat() -> None:
    assert get_sequences(20, tasks=list(ELEVEN), seed=1) == get_sequences(20, tasks=list(ELEVEN), seed=1)
    assert get_sequences(20, tasks=list(ELEVEN), seed=1) != get_sequences(20, tasks=list(ELEVEN), seed=2)


def test_callers_cannot_change_the_cache() -> None:
    get_sequences(3, tasks=list(ELEVEN))[0][1].append("x")
    get_sequences(3, tasks=list(ELEVEN))[0][0]["led"] = 7
    state, tasks = get_sequences(3, tasks=list(ELEVEN))[0]
    assert len(tasks) == 5 and state["led"] in (0, 1)


def test_bad_requests_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="fly"):
        get_sequences(1, tasks=["fly"])
    with pytest.raises(ValueError, match="length=6"):
        get_sequences(1, length=6)
    with pytest.raises(ValueError, match="choose 1 to 2"):
        get_sequences(1, tasks=["open_drawer", "close_drawer"], length=3)
    with pytest.raises(ValueError, match="no sequence of 2"):
        get_sequences(1, tasks=["lift_red_block_table", "lift_blue_block_table"], length=2)


def test_the_tasks_of_the_rules_are_calvins() -> None:
    assert set(TASK_CATEGORIES) == set(TASKS) and len(set(TASK_CATEGORIES.values())) == 11


def test_the_hash_is_that_of_pyhash() -> None:
    assert _fnv1_32("test") == 3910690890


def test_scene_d_has_calvins_poses() -> None:
    state = {
        "led": 1,
        "lightbulb": 1,
        "slider": "left",
        "drawer": "open",
        "red_block": "slider_left",
        "blue_block": "table",
        "pink_block": "slider_right",
        "grasped": 0,
    }
    robot, scene = get_env_state_for_initial_condition(state, SCENES["D"])
    assert robot.shape == (15,) and scene.shape == (24,)
    np.testing.assert_allclose(robot[:6], [0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585])
    np.testing.assert_allclose(scene[:6], [0.28, 0.22, 0, 0.088, 1, 1])
    np.testing.assert_allclose(scene[6:9], [-2.40851662e-01, 9.24044687e-02, 4.60990009e-01], atol=1e-8)
    np.testing.assert_allclose(scene[18:21], [7.03416330e-02, 9.24044687e-02, 4.60990009e-01], atol=1e-8)
    # The position on the table and the yaws are drawn by CALVIN's generator from a hash of the state.
    np.testing.assert_allclose(
        scene[[12, 11, 17, 23]], [0.229995412, 1.8859410064, 1.4881434377, 1.4683986863], atol=1e-9
    )
    np.testing.assert_array_equal(scene, get_env_state_for_initial_condition(state, SCENES["D"])[1])


@pytest.mark.parametrize("name", SCENES)
def test_in_all_scenes_blocks_are_away_from_the_fixtures(name: str) -> None:
    scene = SCENES[name]
    for state in INITIAL_STATES:
        _, obs = get_env_state_for_initial_condition(state, scene)
        for row, block in enumerate(scene.block_names):
            x, y, _ = obs[6 + 6 * row : 9 + 6 * row]
            place = state[f"{block.removeprefix('block_')}_block"]
            if place == "table":
                assert y < 0 and abs(x - scene.button_x) > 0.1
            else:
                door = scene.slide_x0 - (0 if place == "slider_left" else scene.slide_travel)
                left, right = (scene.plank_x[0], door) if place == "slider_left" else (door + 0.28, scene.plank_x[1])
                assert left + 0.04 < x < right - 0.04, (name, place)
        assert obs[0] in (0.0, scene.limits["base__slide"])


def test_a_state_with_blocks_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="grasped"):
        get_env_state_for_initial_condition({**INITIAL_STATES[0], "red_block": "grasped"}, SCENES["D"])
