"""The real calvin_env, if it is installed: geometry, exact repetition, success detection, expert, images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from envs.calvin import env as calvin
from envs.calvin import simulator as calvin_sim
from envs.calvin.env import CalvinEnv
from envs.playtable.env import NEUTRAL_ROBOT_OBS, PlayTableState
from envs.playtable.scene import SCENES
from envs.recording.demonstrate import demonstrate
from envs.sequences import get_sequences
from envs.tasks import ELEVEN, TASKS


@pytest.fixture(scope="module")
def installed() -> Path:
    """The checkout of calvin_env."""
    try:
        return calvin_sim.checkout_root(calvin_sim.import_calvin_env()[1])
    except calvin_sim.CalvinError as error:
        pytest.skip(str(error))


@pytest.fixture
def env(installed: Path, request: pytest.FixtureRequest) -> Iterator[CalvinEnv]:
    """Scene D, or the scene that a test requests."""
    env = CalvinEnv(getattr(request, "param", "D"), renderer="cpu")
    yield env
    env.close()


def wandering(env: CalvinEnv, steps: int = 60, seed: int = 0) -> np.ndarray:
    rng, action, seen = np.random.default_rng(seed), np.zeros(7), []
    for step in range(steps):
        if step % 10 == 0:
            action = rng.uniform(-1, 1, 7) - [0, 0, 0.3, 0, 0, 0, 0]
        seen.append(np.concatenate([*env.step(action, render=False)[0].values()]))
    return np.array(seen)


@pytest.mark.parametrize("env", "ABCD", indirect=True)
def test_playtables_geometry_is_calvins(env: CalvinEnv) -> None:
    bullet, table, scene = env._bullet, env._table, env.scene.name
    env.reset()
    places = {name: bullet.getLinkState(table.uid, number)[4] for number, name in env._links.items() if number >= 0}
    fixtures = SCENES[scene].fixtures
    assert places["slide_link"][0] + env.joint_position("base__slide") == pytest.approx(fixtures.slide_x0, abs=1e-3)
    assert places["drawer_link"][0] == pytest.approx(fixtures.drawer_x, abs=1e-6)
    assert places["switch_link"][0] == pytest.approx(fixtures.switch_x, abs=1e-6)
    np.testing.assert_allclose(places["button_link"], fixtures.button, atol=1e-6)
    for name, part in env._parts.items():
        assert bullet.getJointInfo(table.uid, part.joint_index)[9] == pytest.approx(
            SCENES[scene].limits[name], abs=1e-6
        )
    for block in env._sim.scene.movable_objects:
        np.testing.assert_allclose(
            bullet.getCollisionShapeData(block.uid, -1)[0][3], SCENES[scene].sizes[block.name], atol=1e-6
        )
    surfaces = {name: np.array(box) for name, box in env._sim.scene.surfaces.items()}
    assert surfaces.keys() == SCENES[scene].surfaces.keys()
    for name, box in SCENES[scene].surfaces.items():
        np.testing.assert_allclose(surfaces[name], box, atol=1e-6)


def test_the_configuration_is_the_datasets(installed: Path, shared_data: Path) -> None:
    theirs = OmegaConf.load(shared_data / "calvin_meta" / "merged_config.yaml")
    ours = calvin_sim.make_config(installed, "D", static_size=200, gripper_size=84, egl=True)
    theirs.data_path = ours.data_path
    for part in ("robot", "cameras.static", "cameras.gripper", "scene.objects", "scene.surfaces"):
        one, other = (OmegaConf.to_container(OmegaConf.select(config, part), resolve=True) for config in (ours, theirs))
        # what the dataset's file does not say is a default of the code
        assert {key: one[key] for key in other} == other, part
    for key in ("scene.global_scaling", "env.bullet_time_step", "env.control_freq", "env.use_egl"):
        assert OmegaConf.select(ours, key) == OmegaConf.select(theirs, key), key


def test_the_neutral_pose_and_stored_vectors_are_reproduced(env: CalvinEnv) -> None:
    np.testing.assert_allclose(env.reset()["robot_obs"], NEUTRAL_ROBOT_OBS, atol=1e-5)
    wandering(env)
    for _ in range(20):  # velocities are not part of the vectors
        seen, _ = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]), render=False)
    again = env.reset(robot_obs=seen["robot_obs"], scene_obs=seen["scene_obs"])
    np.testing.assert_allclose(again["robot_obs"], seen["robot_obs"], atol=1e-3)
    np.testing.assert_allclose(again["scene_obs"], seen["scene_obs"], atol=5e-3)  # a reset simulates one step


def test_what_follows_a_state_is_the_same_to_the_bit(env: CalvinEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calvin, "MAX_LOADS_PER_CONNECTION", 4)
    (one, _), (two, _) = get_sequences(2)
    env.reset(one)
    first = wandering(env)
    for looks in (False, True, False):
        env.reset(two)
        wandering(env, seed=1)
        env.reset(one)
        if looks:
            env.get_obs()
        np.testing.assert_array_equal(wandering(env), first)
    assert np.ptp(first[:, :3], axis=0).min() > 0.01


def test_the_oracle_knows_the_same_tasks(env: CalvinEnv) -> None:
    assert set(env._task_oracle.tasks) == set(TASKS)


@pytest.mark.parametrize(
    "task", ["open_drawer", "move_slider_left", "turn_on_lightbulb", "turn_on_led", "lift_red_block_table"]
)
def test_playtables_expert_solves_calvins_tasks(env: CalvinEnv, task: str) -> None:
    state = {
        "led": 0,
        "lightbulb": 0,
        "slider": "right",
        "drawer": "closed",
        "red_block": "table",
        "blue_block": "slider_left",
        "pink_block": "slider_right",
        "grasped": 0,
    }
    env.reset(state)
    expert, start = env.expert(0), env.get_info()
    assert not env.check_success(task, start, start)
    expert.reset(task)
    assert any(env.check_success(task, start, env.step(expert.act(), render=False)[1]) for _ in range(240))


def test_the_privileged_state_reads_a_held_block(env: CalvinEnv) -> None:
    env.reset(next(state for state, _ in get_sequences(20) if state["blue_block"] == "table"))
    expert, state, start = env.expert(0), PlayTableState(env), env.get_info()
    assert state.get_contacts("block_blue") == {"base_link"}
    expert.reset("lift_blue_block_table")
    while not env.check_success("lift_blue_block_table", start, env.step(expert.act(), render=False)[1]):
        assert state.get_contacts("block_blue")
    assert (
        state.get_contacts("block_blue") == {"robot"}
        and state.gripper_action() == -1
        and 0.03 < state.gripper_opening_width() < 0.05
    )
    assert (
        expert.held_block() == "block_blue"
        and np.linalg.norm(state.tcp_pose()[0] - state.block_pose("block_blue")[0]) < 0.03
    )


def test_pictures_show_the_table(env: CalvinEnv) -> None:
    env.reset(next(state for state, _ in get_sequences(50) if state["red_block"] == state["blue_block"] == "table"))
    pictures = env.get_obs()["rgb_obs"]
    static = pictures["rgb_static"].astype(int)
    assert {name: (picture.shape, picture.dtype) for name, picture in pictures.items()} == {
        "rgb_static": ((200, 200, 3), np.uint8),
        "rgb_gripper": ((84, 84, 3), np.uint8),
    }
    for channel in (0, 2):
        others = np.delete(static, channel, axis=2).max(2)
        assert 50 < (static[:, :, channel] - others > 60).sum() < 2000, "a block of this colour lies on the table"
    assert env.versions()["renderer"].startswith("pybullet TinyRenderer")


def test_demonstrations_are_recorded_in_it(env: CalvinEnv) -> None:
    segments, _ = demonstrate(env, ELEVEN, 1, np.random.default_rng(3))
    assert len(segments) == 1 and segments[0].rgb_static[0].shape == (200, 200, 3)
    assert segments[0].absolute_actions().shape == (len(segments[0]), 7)
