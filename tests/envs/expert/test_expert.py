"""The expert solves the tasks, keeps to the action format, and continues from the states where chains leave it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from envs.expert.expert import ScriptedExpert, add_action_noise
from envs.expert.motions import (
    ACROSS_TOLERANCE,
    APPROACH_RADIUS,
    PASS_HEIGHT,
    MotionPrimitives,
    align_yaw,
    gripper_euler,
    nearest_valid_yaw,
    turn_between,
)
from envs.playtable import PlayTableEnv
from envs.playtable.env import PlayTableState
from envs.playtable.scene import SCENES
from envs.recording.starts import feasible_tasks, sample_env_state
from envs.tasks import TASKS

LIMIT = 360


@pytest.fixture(scope="module")
def worlds() -> dict[str, PlayTableEnv]:
    return {}


def world(worlds: dict[str, PlayTableEnv], scene: str) -> PlayTableEnv:
    if scene not in worlds:
        worlds[scene] = PlayTableEnv(scene)
    return worlds[scene]


def carry_out(env: PlayTableEnv, expert: ScriptedExpert, task: str, *, sigma: float = 0.0) -> list[np.ndarray] | None:
    """The clean actions until success, or None without success."""
    rng, before, actions = np.random.default_rng(0), env.get_info(), []
    expert.reset(task)
    for _ in range(LIMIT):
        actions.append(expert.act())
        _, info = env.step(add_action_noise(actions[-1], rng, sigma, noise_allowed=expert.noise_allowed), render=False)
        if env.check_success(task, before, info):
            return actions
    return None


@pytest.mark.parametrize("task", TASKS)
def test_each_task_is_solved_in_most_random_starts(worlds: dict[str, PlayTableEnv], task: str) -> None:
    solved = 0
    for number, scene in enumerate("ABCD"):
        env = world(worlds, scene)
        start = sample_env_state(task, env.scene, np.random.default_rng(100 + number))
        env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
        expert = env.expert(number)
        if start.setup_task:
            carry_out(env, expert, start.setup_task)
        solved += carry_out(env, expert, task) is not None
    assert solved >= 3  # of four; benchmarks/expert_table.py has the full table


def test_actions_are_relative_bounded_and_smooth(worlds: dict[str, PlayTableEnv]) -> None:
    env = world(worlds, "D")
    for task in ("open_drawer", "lift_red_block_table", "turn_on_lightbulb"):
        start = sample_env_state(task, env.scene, np.random.default_rng(4))
        env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
        actions = np.array(carry_out(env, env.expert(1), task))
        assert actions.shape[1] == 7 and actions.dtype == np.float64
        assert np.abs(actions[:, :6]).max() <= 1 and set(actions[:, 6]) <= {-1.0, 1.0}
        assert np.abs(actions[0, :6]).max() <= 0.21  # a ramp, no jump
        speeds = np.abs(actions[:, :6]).max(1)
        assert np.diff(speeds).max() <= 0.35


def test_noise_is_added_to_fast_moves_only_and_never_to_the_gripper() -> None:
    action, rng = np.array([0.5, 0, 0, 0, 0, 0.2, -1.0]), np.random.default_rng(0)
    assert add_action_noise(action, rng, 0.25, noise_allowed=False) is action
    assert add_action_noise(action, rng, 0.0, noise_allowed=True) is action
    noisy = add_action_noise(action, rng, 0.25, noise_allowed=True)
    assert noisy[6] == -1 and (noisy[:6] != action[:6]).all() and np.abs(noisy).max() <= 1
    assert action[0] == 0.5


def test_strong_noise_does_not_stop_it(worlds: dict[str, PlayTableEnv]) -> None:
    env = world(worlds, "D")
    for task in ("open_drawer", "move_slider_left", "lift_blue_block_table"):
        start = sample_env_state(task, env.scene, np.random.default_rng(7))
        env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
        assert carry_out(env, env.expert(0), task, sigma=0.25) is not None, task


def test_a_block_left_in_the_hand_is_put_down_first(worlds: dict[str, PlayTableEnv]) -> None:
    env = world(worlds, "D")
    start = sample_env_state("lift_red_block_table", env.scene, np.random.default_rng(0))
    scene_obs = start.scene_obs.copy()
    scene_obs[1] = 0.0
    env.reset(robot_obs=start.robot_obs, scene_obs=scene_obs)
    expert, state = env.expert(0), PlayTableState(env)
    assert carry_out(env, expert, "lift_red_block_table") is not None and expert.held_block() == "block_red"
    height = state.block_pose("block_red")[0][2]
    assert carry_out(env, expert, "open_drawer") is not None
    assert "robot" not in state.get_contacts("block_red") and state.block_pose("block_red")[0][2] < height - 0.03


def test_speeds_vary_with_the_seed_and_repeat_with_it(worlds: dict[str, PlayTableEnv]) -> None:
    env = world(worlds, "A")
    start = sample_env_state("close_drawer", env.scene, np.random.default_rng(0))

    def run(seed: int) -> np.ndarray:
        env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
        return np.array(carry_out(env, env.expert(seed), "close_drawer"))

    np.testing.assert_array_equal(run(3), run(3))
    assert len({len(run(seed)) for seed in range(4)}) > 1


def test_it_continues_to_the_end_after_success(worlds: dict[str, PlayTableEnv]) -> None:
    env = world(worlds, "D")
    start = sample_env_state("open_drawer", env.scene, np.random.default_rng(0))
    env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
    expert = env.expert(0)
    carry_out(env, expert, "open_drawer")
    for _ in range(40):
        env.step(expert.act(), render=False)
    assert env.joint_position("base__drawer") > 0.2


def test_act_without_a_task_and_unknown_tasks_are_refused(worlds: dict[str, PlayTableEnv]) -> None:
    expert = world(worlds, "D").expert()
    with pytest.raises(RuntimeError, match="reset"):
        expert.act()
    with pytest.raises(ValueError, match="dance"):
        expert.reset("dance")


@pytest.mark.parametrize("scene", SCENES)
def test_random_starts_allow_their_task(worlds: dict[str, PlayTableEnv], scene: str) -> None:
    env = world(worlds, scene)
    missing = []
    for task in TASKS:
        for seed in range(2):
            start = sample_env_state(task, env.scene, np.random.default_rng(seed))
            env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
            wanted = start.setup_task or task
            if wanted not in feasible_tasks(PlayTableState(env)):
                missing.append((task, seed))
    assert len(missing) <= 2, missing  # lifts beside a neighbour that just fits


def test_possible_tasks_follow_the_readings(worlds: dict[str, PlayTableEnv]) -> None:
    env = world(worlds, "D")
    start = sample_env_state("open_drawer", env.scene, np.random.default_rng(0))
    for drawer, slide, can in (
        (0.0, 0.0, {"open_drawer", "move_slider_left"}),
        (0.22, 0.28, {"close_drawer", "move_slider_right"}),
        (0.12, 0.15, set()),
    ):
        scene_obs = start.scene_obs.copy()
        scene_obs[:2] = slide, drawer
        env.reset(robot_obs=start.robot_obs, scene_obs=scene_obs)
        doors = {task for task in feasible_tasks(PlayTableState(env)) if "drawer" in task or "move" in task}
        assert doors & {"open_drawer", "close_drawer", "move_slider_left", "move_slider_right"} == can


def test_yaws_stay_in_front_of_the_robot() -> None:
    for yaw in np.linspace(-7, 7, 40):
        assert -0.6 <= nearest_valid_yaw(yaw) <= 3.05
        assert abs(np.sin(nearest_valid_yaw(yaw) - yaw)) < 1e-9  # the same grasp
    turn = turn_between(np.array([np.pi, 0, -0.6]), gripper_euler(yaw=3.0))
    assert turn[2] == pytest.approx(3.6) and abs(turn[0]) < 1e-9
    assert align_yaw(np.pi / 2 + 0.2, 0.3) == pytest.approx(np.pi / 2)
    assert align_yaw(np.pi / 2 - 0.5, 0.3) == pytest.approx(np.pi / 2 - 0.2)


def test_it_lifts_as_soon_as_the_fingers_have_closed(worlds: dict[str, PlayTableEnv]) -> None:
    """Images of a pause look alike from beginning to end, so a policy without memory would stay in it."""
    env = world(worlds, "A")
    start = sample_env_state("lift_red_block_table", env.scene, np.random.default_rng(3))
    env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
    closed = [action for action in carry_out(env, env.expert(0), "lift_red_block_table") if action[6] < 0]
    still = [not action[:6].any() for action in closed]
    assert (
        2 <= sum(still) <= 4 and not any(still[sum(still) :]) and all(action[2] > 0 for action in closed[sum(still) :])
    )


@pytest.mark.parametrize(
    "aside, height, turn", [((0.03, 0.02), 0.06, 0.3), ((0.0, 0.03), 0.005, 0.0), ((-0.02, -0.04), 0.1, -0.3)]
)
def test_an_open_hand_near_a_block_goes_straight_to_it(
    worlds: dict[str, PlayTableEnv], aside: tuple[float, float], height: float, turn: float
) -> None:
    """Near a grasp the expert shows small corrections and no detour over the table."""
    env = world(worlds, "A")
    start = sample_env_state("lift_red_block_table", env.scene, np.random.default_rng(3))
    env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
    expert, begun = env.expert(0), env.get_info()
    block, euler = expert.state.block_pose("block_red")[0], expert.grasp_euler("block_red")
    place, euler = block + [*aside, height], euler + [0, 0, turn]
    for action in _there(expert, place, euler):
        env.step(action, render=False)
    expert.reset("lift_red_block_table")
    highest, grasped = 0.0, False
    for _ in range(60):
        action = expert.act()
        grasped = grasped or action[6] < 0
        _, info = env.step(action, render=False)
        if not grasped:
            highest = max(highest, expert.state.target_pose()[0][2] - place[2])
        if env.check_success("lift_red_block_table", begun, info):
            break
    else:
        pytest.fail("not lifted in two seconds")
    assert highest < 0.06


def _there(expert: ScriptedExpert, place: np.ndarray, euler: np.ndarray) -> Iterator[np.ndarray]:
    yield from expert.move_above(*place[:2], euler)
    yield from expert.move_to(place, euler)


def test_the_approach_path_is_low_in_the_middle_and_lifts_fingers_over_the_block(
    worlds: dict[str, PlayTableEnv],
) -> None:
    motions, block, euler = (
        MotionPrimitives(PlayTableState(world(worlds, "A")), np.random.default_rng(0)),
        np.array([0.1, -0.1, 0.46]),
        gripper_euler(),
    )
    approach_path = motions.approach_path(block, euler)
    assert np.allclose(approach_path(block + [0, 0, 0.1], euler), block), "straight down on the axis"
    heights = [approach_path(block + [0, off, 0.1], euler)[2] for off in (0.01, 0.02, 0.03, 0.2)]
    assert heights == sorted(heights) and heights[-1] == pytest.approx(block[2] + APPROACH_RADIUS)
    assert approach_path(block + [0.02, 0, 0.1], euler)[2] > block[2] + PASS_HEIGHT, "fingers would meet the block"
    low = approach_path(block + [ACROSS_TOLERANCE + 0.005, 0, 0.0], euler)
    assert low[2] > block[2] + PASS_HEIGHT and np.allclose(low[:2], block[:2] + [ACROSS_TOLERANCE + 0.005, 0]), (
        "first up, then across"
    )
    assert approach_path(block + [0, 0, 0.1], euler + [0, 0, 0.5])[2] > block[2], "with a wrong yaw, too"
